"""Masks that are filled in with large negative numbers, as the boolean masks that they are."""

from __future__ import annotations

from typing import Any, ClassVar, Final

import torch
from torch import fx

from normfuse.graph import Graph, ops, query
from normfuse.graph.edit import Editor
from normfuse.rewrite.pattern import Match, call
from normfuse.rewrite.rule import Rule

__all__ = ["CLOSED", "MASK", "MASK_RULES"]

ATEN = ops.ATEN

MASK: Final = ATEN.where.ScalarOther

CLOSED: Final = -(2.0**30)
"""What stands for a masked score: no exponential is left of it, and a row of nothing else is no NaN."""

FILLED: Final = ATEN.masked_fill.Scalar

SHUT: Final = -1e4
"""A score that is at most this is masked: scores of a network are some hundreds at most, and e^-104 is 0 in float32."""

VIEWS: Final = (ops.RESHAPE, ops.EXPAND, ops.PERMUTE, ops.UNSQUEEZE, ops.SLICE, ops.SELECT, ops.CLONE)

NOTHING: Final = (ATEN.zeros_like.default, ATEN.zeros.default, ATEN.new_zeros.default)


class FilledScoresAreMasked(Rule[fx.Node]):
    """softmax(masked_fill(scores, mask, -inf)) = softmax(where(not mask, scores, -2^30)), and so for ``where``.

    Exact up to rounding, but in a row where all is masked: -inf makes NaN there, -2^30 the mean, as any finite number.
    """

    name: ClassVar[str] = "filled-scores-are-masked"
    pattern = call(ops.SOFTMAX)

    def plan(self, graph: Graph, match: Match) -> fx.Node | None:
        """Return what fills scores in; nobody else reads it."""
        filled = match.root.args[0]
        if not isinstance(filled, fx.Node) or query.only_reader(filled) is None:
            return None
        is_where = query.is_call(filled, MASK) and query.dtype(query.operand(filled, 0)) is torch.bool
        is_filled = query.is_call(filled, FILLED) or (is_where and filled.args[2] != CLOSED)
        return filled if is_filled and _shuts(filled.args[2]) else None

    def rewrite(self, match: Match, plan: fx.Node, edit: Editor) -> None:
        """Mask instead."""
        if query.is_call(plan, FILLED):
            kept, scores = _open(edit, query.operand(plan, 1), at=plan), plan.args[0]
        else:
            kept, scores = query.operand(plan, 0), plan.args[1]
        edit.replace(plan, MASK, kept, scores, CLOSED)


class FilledMaskIsBoolean(Rule[list[fx.Node]]):
    """attention(q, k, v; views of masked_fill(0, mask, -inf)) = attention(q, k, v; views of (not mask)).

    ``torch.nn.MultiheadAttention`` makes such a mask of its ``key_padding_mask``.
    """

    name: ClassVar[str] = "filled-mask-is-boolean"
    pattern = call(ops.ATTENTION)

    def plan(self, graph: Graph, match: Match) -> list[fx.Node] | None:
        """Return the views and what they are of, last first."""
        mask, found = query.argument(match.root, 3, "attn_mask"), list[fx.Node]()
        while query.is_call(mask, *VIEWS):
            found.append(mask)
            mask = mask.args[0]
        if not query.is_call(mask, FILLED) or not _shuts(mask.args[2]) or not _is_nothing(graph, mask.args[0]):
            return None
        is_whole = query.shape(mask) == query.shape(query.operand(mask, 1))  # a view of less would be another one
        return [*found, mask] if is_whole else None

    def rewrite(self, match: Match, plan: list[fx.Node], edit: Editor) -> None:
        """Let attention read the boolean mask, moved as the other was."""
        node, (*views, filled) = match.root, plan
        kept = _open(edit, query.operand(filled, 1), at=filled)
        for view in reversed(views):
            kept = edit.call(view.target, kept, *view.args[1:], at=view, **dict[str, Any](view.kwargs))
        kwargs: dict[str, Any] = {key: each for key, each in node.kwargs.items() if key != "attn_mask"}
        edit.replace(node, ops.ATTENTION, *node.args[:3], kept, *node.args[4:], **kwargs)


def _open(edit: Editor, mask: fx.Node, *, at: fx.Node) -> fx.Node:
    """Return where a mask that shuts is open."""
    return edit.call(ATEN.logical_not.default, mask, at=at)


def _shuts(value: object) -> bool:
    return isinstance(value, (int, float)) and value <= SHUT


def _is_nothing(graph: Graph, node: object) -> bool:
    """Return whether a node is 0 everywhere, whatever its size."""
    if not isinstance(node, fx.Node):
        return False
    if query.is_constant(node):
        return not bool(query.constant(graph, node).any())
    if query.is_call(node, ATEN.full.default, ATEN.full_like.default):
        return bool(node.args[1] == 0)
    return query.is_call(node, *NOTHING)


MASK_RULES: Final[tuple[Rule[Any], ...]] = (FilledScoresAreMasked(), FilledMaskIsBoolean())
"""For attention whose mask comes with every sample."""
