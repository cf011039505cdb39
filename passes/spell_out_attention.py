"""Writes scaled dot product attention as its two products and a softmax."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

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
        after    y = open * (softmax((scale * q) k^T + mask') v)

    The scale stands at q, where it folds into q's linear map. A mask that lets everything through goes. Of a row of
    the mask that lets nothing through, attention makes zeros and a plain softmax NaN: in mask' such a row is open, and
    ``open`` is 0 there, else 1 (left out without such rows).
    Exact up to rounding. Applies where
    1. attention is not causal, has no dropout and no grouped heads,
    2. the mask is absent or constant, additive or boolean (behind views: additive and shut nowhere),
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
        source = _behind(query.argument(match.root, 3, "attn_mask"), ops.EXPAND, *ops.VIEWS)
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
class _Mask:
    """What is added to the scores and what the output is multiplied with; nodes that exist, or new constants."""

    added: fx.Node | Tensor | None = None
    opened: Tensor | None = None


@dataclass(frozen=True, slots=True)
class _Attention:
    q: fx.Node
    k: fx.Node
    v: fx.Node
    mask: _Mask
    scale: float


class AttentionIsProducts(Rule[_Attention]):
    """attention = open * (softmax((scale q) k^T + mask') v)."""

    name: ClassVar[str] = "attention-is-products"
    pattern = call(ops.ATTENTION)

    def plan(self, graph: Graph, match: Match) -> _Attention | Refusal:
        """Return the operands, or why this attention is left whole."""
        node = match.root
        q, k, v = node.args[:3]
        mask = _plan_mask(graph, node, query.argument(node, 3, "attn_mask"))
        is_plain = not query.argument(node, 4, "dropout_p", 0.0) and not query.argument(node, 5, "is_causal", False)
        if not is_plain or node.kwargs.get("enable_gqa", False):
            return Refusal(node.name, Reason.UNKNOWN_OPERATOR, "causal or grouped attention", query.layer_of(node))
        if mask is None:
            return Refusal(node.name, Reason.UNKNOWN_OPERATOR, "a mask that is not constant", query.layer_of(node))
        assert isinstance(q, fx.Node)
        assert isinstance(k, fx.Node)
        assert isinstance(v, fx.Node)
        given = node.kwargs.get("scale")
        width = query.shape(q)[-1]
        scale = float(given) if given is not None else 1.0 / math.sqrt(width)  # type: ignore[arg-type]
        return _Attention(q, k, v, mask, scale)

    def rewrite(self, match: Match, plan: _Attention, edit: Editor) -> None:
        """Replace the call by its products."""
        node = match.root
        order = list(range(query.rank(plan.k)))
        order[-1], order[-2] = order[-2], order[-1]
        scaled = edit.call(ops.MUL, plan.q, plan.scale, at=node)
        turned = edit.call(ops.PERMUTE, plan.k, order, at=node)
        scores = edit.call(ops.MATMUL, scaled, turned, at=node, name=f"{node.name}_scores")
        if plan.mask.added is not None:
            scores = edit.call(ops.ADD, scores, _constant(edit, node, plan.mask.added, "mask"), at=node)
        weights = edit.call(ops.SOFTMAX, scores, -1, at=node, name=f"{node.name}_weights")
        if plan.mask.opened is None:
            edit.replace(node, ops.MATMUL, weights, plan.v)
            return
        values = edit.call(ops.MATMUL, weights, plan.v, at=node)
        edit.replace(node, ops.MUL, values, _constant(edit, node, plan.mask.opened, "open_rows"))


def _plan_mask(graph: Graph, attention: fx.Node, mask: fx.Node | None) -> _Mask | None:
    """Return what to add and to multiply, or None where the mask is not constant (2)."""
    if mask is None:
        return _Mask()
    source = _behind(mask, ops.EXPAND)  # addition broadcasts itself
    if query.is_constant(source):
        return _constant_mask(source, query.constant(graph, source), query.dtype(attention))
    source = _behind(mask, ops.EXPAND, *ops.VIEWS)
    # Behind a view the rows are others, so not one position may be shut.
    is_plain = query.is_constant(source) and query.dtype(source).is_floating_point
    return _Mask(mask) if is_plain and not query.constant(graph, source).isneginf().any() else None


def _constant_mask(source: fx.Node, data: Tensor, dtype: torch.dtype) -> _Mask:
    added = data if data.is_floating_point() else torch.zeros(data.shape, dtype=dtype).masked_fill(~data, -torch.inf)
    shut = added.isneginf().all(dim=-1, keepdim=True)
    if not shut.any():
        return _Mask(source if added is data else added)
    return _Mask(added.masked_fill(shut, 0.0), (~shut).to(dtype))


def _constant(edit: Editor, attention: fx.Node, value: fx.Node | Tensor, name: str) -> fx.Node:
    if isinstance(value, fx.Node):
        return value
    return edit.constant(value, f"{query.layer_of(attention) or attention.name}.{name}", like=attention)


def _behind(node: Any, *targets: Any) -> Any:
    while query.is_call(node, *targets):
        node = node.args[0]
    return node
