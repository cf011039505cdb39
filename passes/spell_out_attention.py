"""Writes scaled dot product attention as its two products and a softmax."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx

from normfuse.graph import Graph, ops, query
from normfuse.graph.edit import Editor
from normfuse.pipeline import Fact, Pass
from normfuse.report import PassReport, Reason, Refusal
from normfuse.rewrite import Match, Rule, apply_rules, call

__all__ = ["SpellOutAttention"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SpellOutAttention(Pass):
    """Write attention with the operators that a runtime has integer kernels for.

        before   y = attention(q, k, v; mask, scale)
        after    y = softmax((scale * q) k^T + mask) v

    The scale stands at q, where it folds into q's linear map. A mask that lets everything through goes.
    Exact up to rounding. Applies where
    1. attention is not causal, has no dropout and no grouped heads,
    2. the mask is absent, constant and all true, or an additive constant in which every row lets something through
       (of a row that lets nothing through, attention makes zeros and a plain softmax makes NaN),
    3. the axes of q, k and v are known in number (any batch).
    """

    name: ClassVar[str] = "spell-out-attention"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.CANONICAL})

    def run(self, graph: Graph) -> PassReport:
        """Apply the rules wherever they hold."""
        rules: list[Rule[Any]] = [DropOpenMask(), AttentionIsProducts()]
        return apply_rules(graph, rules, name=self.name)


class DropOpenMask(Rule[None]):
    """A boolean mask that is true everywhere masks nothing."""

    name: ClassVar[str] = "drop-open-mask"
    pattern = call(ops.ATTENTION)

    def plan(self, graph: Graph, match: Match) -> Any:
        """Return a plan if the mask comes from a constant that is all true."""
        source = _behind_views(query.argument(match.root, 3, "attn_mask"))
        if not query.is_constant(source):
            return None
        mask = query.constant(graph, source)
        return () if not mask.is_floating_point() and bool(mask.bool().all()) else None

    def rewrite(self, match: Match, plan: None, edit: Editor) -> None:
        """Call attention without a mask."""
        kwargs: dict[str, Any] = {key: value for key, value in match.root.kwargs.items() if key != "attn_mask"}
        rest = match.root.args[4:]
        edit.replace(match.root, ops.ATTENTION, *match.root.args[:3], *((None, *rest) if rest else ()), **kwargs)


@dataclass(frozen=True, slots=True)
class _Attention:
    q: fx.Node
    k: fx.Node
    v: fx.Node
    mask: fx.Node | None
    scale: float


class AttentionIsProducts(Rule[_Attention]):
    """attention = softmax((scale q) k^T + mask) v."""

    name: ClassVar[str] = "attention-is-products"
    pattern = call(ops.ATTENTION)

    def plan(self, graph: Graph, match: Match) -> _Attention | Refusal:
        """Return the operands, or why this attention is left whole."""
        node = match.root
        q, k, v = node.args[:3]
        mask = query.argument(node, 3, "attn_mask")
        is_plain = not query.argument(node, 4, "dropout_p", 0.0) and not query.argument(node, 5, "is_causal", False)
        if not is_plain or node.kwargs.get("enable_gqa", False):
            return Refusal(node.name, Reason.UNKNOWN_OPERATOR, "causal or grouped attention", query.layer_of(node))
        if mask is not None and (obstacle := _obstacle(graph, mask)):
            return Refusal(node.name, Reason.UNKNOWN_OPERATOR, obstacle, query.layer_of(node))
        assert isinstance(q, fx.Node)
        assert isinstance(k, fx.Node)
        assert isinstance(v, fx.Node)
        given = node.kwargs.get("scale")
        width = query.shape(q)[-1]
        scale = float(given) if given is not None else 1.0 / math.sqrt(width)  # type: ignore[arg-type]
        return _Attention(q, k, v, mask, scale)

    def rewrite(self, match: Match, plan: _Attention, edit: Editor) -> None:
        """Replace the call by five."""
        node = match.root
        order = list(range(query.rank(plan.k)))
        order[-1], order[-2] = order[-2], order[-1]
        scaled = edit.call(ops.MUL, plan.q, plan.scale, at=node)
        turned = edit.call(ops.PERMUTE, plan.k, order, at=node)
        scores = edit.call(ops.MATMUL, scaled, turned, at=node, name=f"{node.name}_scores")
        if plan.mask is not None:
            scores = edit.call(ops.ADD, scores, plan.mask, at=node)
        weights = edit.call(ops.SOFTMAX, scores, -1, at=node, name=f"{node.name}_weights")
        edit.replace(node, ops.MATMUL, weights, plan.v)


def _behind_views(mask: Any) -> Any:
    while query.is_call(mask, ops.EXPAND, *ops.VIEWS):
        mask = mask.args[0]
    return mask


def _obstacle(graph: Graph, mask: fx.Node) -> str:
    """Return what keeps the mask from being added in front of a plain softmax (2), or an empty string."""
    if not query.dtype(mask).is_floating_point:
        return "a boolean mask"
    source = _behind_views(mask)
    if not query.is_constant(source):
        return "a mask that is not constant"
    shut = query.constant(graph, source).isneginf()
    # Behind a view the rows are others, so one shut position is enough to refuse.
    is_row_shut = bool((shut.all(dim=-1) if source is mask else shut).any())
    return "a mask with a row that lets nothing through" if is_row_shut else ""
