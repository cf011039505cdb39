"""Writes scaled dot product attention with a boolean mask as its two products, a mask and a softmax."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from normfuse.graph import Graph, ops, query
from normfuse.graph.edit import Editor
from normfuse.pipeline import Fact, Pass
from normfuse.report import PassReport, Reason, Refusal
from normfuse.rewrite import Match, Rule, apply_rules, call
from normfuse.rewrite.masks import CLOSED, MASK

__all__ = ["SpellOutMaskedAttention"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SpellOutMaskedAttention(Pass):
    """Let the scores of attention be seen whose mask comes with every sample.

        before   y = attention(q, k, v; mask, scale)
        after    y = softmax(where(mask, (scale * q) k^T, -2^30)) v

    ``spell-out-attention`` has written all other attention so. Exact up to rounding, but where a row's mask lets
    nothing through: attention makes zeros there, a softmax the mean of v. Applies where
    1. the mask is boolean,
    2. attention is not causal, has no dropout and no grouped heads,
    3. the channels of q are known in number.
    """

    name: ClassVar[str] = "spell-out-masked-attention"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.CANONICAL})

    def run(self, graph: Graph) -> PassReport:
        """Apply the rule wherever it holds."""
        return apply_rules(graph, [MaskedAttentionIsProducts()], name=self.name)


class MaskedAttentionIsProducts(Rule[float]):
    """attention = softmax(where(mask, (scale q) k^T, -2^30)) v."""

    name: ClassVar[str] = "masked-attention-is-products"
    pattern = call(ops.ATTENTION)

    def plan(self, graph: Graph, match: Match) -> float | Refusal:
        """Return the scale, or why this attention is left whole."""
        node = match.root
        mask, width = query.argument(node, 3, "attn_mask"), query.shape(query.operand(node, 0))[-1]
        is_plain = not query.argument(node, 4, "dropout_p", 0.0) and not query.argument(node, 5, "is_causal", False)
        given = query.argument(node, 6, "scale")
        if not is_plain or node.kwargs.get("enable_gqa", False):
            return _left(node, "causal or grouped attention")
        if mask is None or query.dtype(mask) is not torch.bool:
            return _left(node, "a mask that is not boolean")
        if given is None and not isinstance(width, int):
            return _left(node, "channels of no fixed number")
        return float(given) if given is not None else int(width) ** -0.5

    def rewrite(self, match: Match, plan: float, edit: Editor) -> None:
        """Replace the call by its products."""
        node = match.root
        q, k, v = (query.operand(node, index) for index in range(3))
        mask, rank = query.argument(node, 3, "attn_mask"), query.rank(k)
        scaled = edit.call(ops.MUL, q, plan, at=node)
        turned = edit.call(ops.PERMUTE, k, [*range(rank - 2), rank - 1, rank - 2], at=node)
        scores = edit.call(ops.MATMUL, scaled, turned, at=node, name=f"{node.name}_scores")
        masked = edit.call(MASK, mask, scores, CLOSED, at=node)
        weights = edit.call(ops.SOFTMAX, masked, -1, at=node, name=f"{node.name}_weights")
        edit.replace(node, ops.MATMUL, weights, v)


def _left(node: fx.Node, detail: str) -> Refusal:
    return Refusal(node.name, Reason.UNKNOWN_OPERATOR, detail, query.layer_of(node))
