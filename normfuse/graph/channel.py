"""Where a channel axis goes through the operators that a per-channel affine commutes with."""

from __future__ import annotations

from math import prod
from typing import Any

from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from normfuse.graph import ops, query

__all__ = ["axis_after", "axis_before"]


def axis_before(view: fx.Node, axis: int) -> int | None:
    """Return the axis of the view's input that becomes ``axis`` of its output, or None if it is not kept."""
    source = view.args[0]
    assert isinstance(source, fx.Node)
    if view.target is ops.PERMUTE:
        return int(view.args[1][axis]) % query.rank(source)  # type: ignore[index, arg-type]
    if view.target is ops.RESHAPE:
        return _kept_axis(query.shape(view), axis, query.shape(source))
    return None


def axis_after(node: fx.Node, axis: int) -> int | None:
    """Return where the input's ``axis`` stands in the output of a commuting operator, or None.

    Commuting (methods of the fold): permute, reshape that keeps the axis whole, selection of positions
    on another axis, and the mean over other axes.
    """
    source = node.args[0]
    if not isinstance(source, fx.Node):
        return None
    rank = query.rank(source)
    if node.target is ops.PERMUTE:
        return [int(position) % rank for position in node.args[1]].index(axis)  # type: ignore[union-attr, arg-type]
    if node.target is ops.RESHAPE:
        return _kept_axis(query.shape(source), axis, query.shape(node))
    if node.target in ops.SELECTIONS:
        return _after_selection(node, axis, rank)
    if node.target is ops.MEAN:
        return _after_mean(node, axis, rank)
    return None


def _after_selection(node: fx.Node, axis: int, rank: int) -> int | None:
    selected = int(query.argument(node, 1, "dim", 0)) % rank
    if selected == axis:
        return None
    return axis - 1 if node.target is ops.SELECT and selected < axis else axis


def _after_mean(node: fx.Node, axis: int, rank: int) -> int | None:
    over = {int(position) % rank for position in query.argument(node, 1, "dim", ()) or range(rank)}
    if axis in over:
        return None
    keeps = bool(query.argument(node, 2, "keepdim", False))
    return axis if keeps else axis - sum(position < axis for position in over)


def _kept_axis(source: Any, axis: int, target: Any) -> int | None:
    """Return the axis of ``target`` with the same size and the same number of elements behind it."""
    behind = prod(source[axis + 1 :])
    for candidate, size in enumerate(target):
        if statically_known_true(size == source[axis]) and statically_known_true(
            prod(target[candidate + 1 :]) == behind
        ):
            return candidate
    return None
