"""How a per-channel affine goes through one operator, from its input to its output and back.

Every operator here puts input positions at output positions, mixes positions of other axes with weights that sum to
one (methods 13.2), or takes a maximum (of a window, or with zero: ReLU), which a positive scale passes. One table,
``_WIRINGS``, says which channel of the input each channel of the output is; both directions follow from it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from math import prod
from typing import Any, Final

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from normfuse.graph import Graph, ops, query
from normfuse.graph.affine import Affine
from normfuse.report import Reason

__all__ = ["Wiring", "backward", "forward", "source_of", "wirings"]


@dataclass(frozen=True, slots=True)
class Wiring:
    """``axis`` of the output; its position ``j`` is position ``index[j]`` of the input's channel axis."""

    axis: int
    index: Tensor


def source_of(node: fx.Node) -> fx.Node | None:
    """Return the tensor whose elements an operator of the table moves or averages, or None for other operators."""
    if query.is_call(node, ops.GETITEM):
        node = node.args[0]  # type: ignore[assignment]
        if not query.is_call(node, *ops.SPLITS, ops.ATEN.unbind.int):
            return None
    elif node.target not in _WIRINGS:
        return None
    source = node.args[0]
    return source if isinstance(source, fx.Node) else None


def forward(graph: Graph, node: fx.Node, found: Affine) -> Affine | Reason:
    """Return the affine ``B`` with ``node(A(x)) == B(node(x))``, or why there is none."""
    if (reason := _refused(node, found)) is not None:
        return reason
    if found.is_uniform:
        return found
    wiring = _WIRINGS[node.target](graph, node, found.axis)
    if wiring is None:
        return Reason.AXIS
    wide = found.spread()
    return Affine(wide.scale[wiring.index], wide.shift[wiring.index], wiring.axis)


def backward(graph: Graph, node: fx.Node, wanted: Affine) -> Affine | Reason:
    """Return the affine ``A`` with ``node(A(x)) == B(node(x))`` for ``wanted`` B, or why there is none.

    Channels that ``node`` leaves out keep the identity.
    """
    if (reason := _refused(node, wanted)) is not None:
        return reason
    found = wirings(graph, node)
    if wanted.is_uniform:
        if wanted.axis and query.rank(source_of(node)) == query.rank(node):  # type: ignore[arg-type]
            for axis, wiring in found.items():  # one channel is cut out: it alone takes its numbers
                if wiring.axis == wanted.axis and wiring.index.numel() == 1:
                    return _scattered(wanted, wiring, axis, _size(node, axis))
        return wanted
    for axis, wiring in found.items():
        if (placed := _placed(wanted, wiring, axis, _size(node, axis))) is not None:
            return placed
    if query.is_call(node, ops.RESHAPE) and (joined := _rearranged(query.shape(node), _shape(node), wanted.axis)):
        wide = wanted.spread()  # what a reshape cuts apart another one joins: of each head's channels to all of them
        return Affine(wide.scale[joined.index], wide.shift[joined.index], joined.axis)
    return Reason.AXIS


def wirings(graph: Graph, node: fx.Node) -> dict[int, Wiring]:
    """Return the wiring of every axis of the input that arrives on one axis of the output."""
    source = source_of(node)
    assert source is not None
    found = {
        axis: _WIRINGS[node.target](graph, node, axis)
        for axis, size in enumerate(query.shape(source))
        if isinstance(size, int)
    }
    return {axis: wiring for axis, wiring in found.items() if wiring is not None}


def _placed(wanted: Affine, wiring: Wiring, axis: int, size: int) -> Affine | None:
    """Return the affine of the input's ``axis`` that gives the wanted one behind the wiring."""
    wide = wanted.spread()
    if wiring.axis != wide.axis or wiring.index.numel() != wide.scale.numel():
        return None
    found = _scattered(wide, wiring, axis, size)
    scale, shift = found.scale[wiring.index], found.shift[wiring.index]
    return found if torch.equal(scale, wide.scale) and torch.equal(shift, wide.shift) else None


def _scattered(wanted: Affine, wiring: Wiring, axis: int, size: int) -> Affine:
    """Return the wanted numbers where the wiring takes them from, and the identity elsewhere."""
    scale, shift = torch.ones(size, dtype=torch.float64), torch.zeros(size, dtype=torch.float64)
    scale[wiring.index], shift[wiring.index] = wanted.scale, wanted.shift
    return Affine(scale, shift, axis)


def _refused(node: fx.Node, found: Affine) -> Reason | None:
    """Return why these constants do not pass the operator, whatever their axis."""
    if node.target in ops.MAXIMUM_POOLS and bool((found.scale < 0).any()):
        return Reason.NEGATIVE_SCALE
    if node.target is ops.RELU and bool((found.scale < 0).any() or found.shift.any()):
        return Reason.NONLINEAR_READER
    if node.target is ops.PAD and query.argument(node, 3, "value"):
        return Reason.PADDED_VALUE
    if _adds_zeros(node) and bool(found.shift.any()):
        return Reason.ZERO_PADDING
    return None


def _adds_zeros(node: fx.Node) -> bool:
    """Return whether zeros count as elements: the weights of a position then do not sum to one."""
    if node.target is ops.PAD:
        return bool(query.argument(node, 2, "mode", "constant") == "constant")
    if node.target in ops.AVERAGE_POOLS:
        if query.argument(node, 6, "divisor_override"):  # a sum over the window, divided by another number
            return True
        padding = query.argument(node, 3, "padding", 0)
        padded = any(padding) if isinstance(padding, (list, tuple)) else bool(padding)
        return bool(padded and query.argument(node, 5, "count_include_pad", True))
    return False


# The wirings: from a channel axis of the input to the output's. None: the channels do not arrive on one axis.


def _whole(node: fx.Node, axis: int, target: int) -> Wiring:
    """Return the wiring of an axis that arrives as it is."""
    return Wiring(target, torch.arange(_size(node, axis)))


def _relu(graph: Graph, node: fx.Node, axis: int) -> Wiring:
    return _whole(node, axis, axis)


def _size(node: fx.Node, axis: int) -> int:
    return int(_shape(node)[axis])


def _shape(node: fx.Node) -> Any:
    source = source_of(node)
    assert source is not None
    return query.shape(source)


def _permute(graph: Graph, node: fx.Node, axis: int) -> Wiring:
    rank = query.rank(node)
    return _whole(node, axis, [int(position) % rank for position in node.args[1]].index(axis))  # type: ignore[union-attr, arg-type]


def _reshape(graph: Graph, node: fx.Node, axis: int) -> Wiring | None:
    return _rearranged(_shape(node), query.shape(node), axis)


def _rearranged(source: Any, target: Any, axis: int) -> Wiring | None:
    """Find the output axis that holds the channel axis whole, alone or together with axes next to it.

    An element stands at channel ``(i // behind) % size`` if ``i`` counts elements; an output axis that steps
    through ``covered`` of them, ``own`` at a time, knows the channel if it covers the channel axis.
    """
    if not isinstance(source[axis], int):
        return None
    size, behind = source[axis], prod(source[axis + 1 :])
    for candidate, count in enumerate(target):
        own = prod(target[candidate + 1 :])
        if statically_known_true(count == size) and statically_known_true(own == behind):
            return Wiring(candidate, torch.arange(size))
        if not all(isinstance(number, int) for number in (count, own, behind)):
            continue
        if behind % own == 0 and (own * count) % (behind * size) == 0:
            return Wiring(candidate, torch.arange(int(count)) // (behind // own) % size)
    return None


def _select(graph: Graph, node: fx.Node, axis: int) -> Wiring:
    selected = int(query.argument(node, 1, "dim", 0)) % len(_shape(node))
    if selected == axis:  # one channel is left: its numbers hold everywhere
        return Wiring(0, torch.tensor([int(query.argument(node, 2, "index")) % _size(node, axis)]))
    return _whole(node, axis, axis - (selected < axis))


def _slice(graph: Graph, node: fx.Node, axis: int) -> Wiring | None:
    if int(query.argument(node, 1, "dim", 0)) % len(_shape(node)) != axis:
        return _whole(node, axis, axis)
    bounds = [query.argument(node, 2, "start"), query.argument(node, 3, "end"), query.argument(node, 4, "step", 1)]
    if not all(bound is None or isinstance(bound, int) for bound in bounds):
        return None
    return Wiring(axis, torch.arange(_size(node, axis))[slice(*bounds)])


def _part(graph: Graph, node: fx.Node, axis: int) -> Wiring | None:
    """Wire ``getitem(split(x), i)`` and ``getitem(unbind(x), i)``."""
    split, index = node.args[0], int(node.args[1])  # type: ignore[arg-type]
    assert isinstance(split, fx.Node)
    is_unbind = query.is_call(split, ops.ATEN.unbind.int)
    cut = int(query.argument(split, 1 if is_unbind else 2, "dim", 0)) % len(_shape(node))
    if cut != axis:
        return _whole(node, axis, axis - (is_unbind and cut < axis))
    if is_unbind:
        return Wiring(0, torch.tensor([index]))
    widths = [int(part.shape[cut]) for part in split.meta["val"]]
    starts = [0, *accumulate(widths)]
    return Wiring(axis, torch.arange(starts[index], starts[index + 1]))


def _index_select(graph: Graph, node: fx.Node, axis: int) -> Wiring | None:
    positions = node.args[2]
    if int(node.args[1]) % len(_shape(node)) != axis:  # type: ignore[arg-type]
        return _whole(node, axis, axis)
    return Wiring(axis, query.constant(graph, positions)) if query.is_constant(positions) else None  # type: ignore[arg-type]


def _mean(graph: Graph, node: fx.Node, axis: int) -> Wiring | None:
    rank = len(_shape(node))
    over = {int(position) % rank for position in query.argument(node, 1, "dim", ()) or range(rank)}
    if axis in over:
        return None
    keeps = bool(query.argument(node, 2, "keepdim", False))
    return _whole(node, axis, axis if keeps else axis - sum(position < axis for position in over))


def _spatial(graph: Graph, node: fx.Node, axis: int) -> Wiring | None:
    """Wire pooling and interpolation: the last axes mix, those before them stay."""
    return _whole(node, axis, axis) if axis < query.rank(node) - SPATIAL[node.target] else None


def _roll(graph: Graph, node: fx.Node, axis: int) -> Wiring | None:
    axes = [int(position) % query.rank(node) for position in query.argument(node, 2, "dims", ())]
    shifts = query.argument(node, 1, "shifts")
    if not axes or not all(isinstance(shift, int) for shift in shifts):
        return None  # rolled as if flat, or by a size known at run time only
    moved = sum(int(shift) for shift, position in zip(shifts, axes, strict=True) if position == axis)
    return Wiring(axis, torch.arange(_size(node, axis)).roll(moved))


def _flip(graph: Graph, node: fx.Node, axis: int) -> Wiring:
    index = torch.arange(_size(node, axis))
    is_turned = axis in [int(position) % query.rank(node) for position in node.args[1]]  # type: ignore[union-attr, arg-type]
    return Wiring(axis, index.flip(0) if is_turned else index)


def _expand(graph: Graph, node: fx.Node, axis: int) -> Wiring | None:
    target = axis + query.rank(node) - len(_shape(node))
    return _whole(node, axis, target) if statically_known_true(query.shape(node)[target] == _size(node, axis)) else None


def _repeat(graph: Graph, node: fx.Node, axis: int) -> Wiring | None:
    target = axis + query.rank(node) - len(_shape(node))
    count = query.shape(node)[target]
    return Wiring(target, torch.arange(count) % _size(node, axis)) if isinstance(count, int) else None


def _pad(graph: Graph, node: fx.Node, axis: int) -> Wiring | None:
    amounts = list(node.args[1])  # type: ignore[arg-type]
    padded = query.rank(node) - len(amounts) // 2
    own = amounts[2 * (query.rank(node) - 1 - axis) :][:2] if axis >= padded else []
    return _whole(node, axis, axis) if all(amount == 0 for amount in own) else None


SPATIAL: Final = {**ops.AVERAGE_POOLS, **ops.ADAPTIVE_AVERAGE_POOLS, **ops.UPSAMPLINGS, **ops.MAXIMUM_POOLS}

_WIRINGS: Final[dict[Any, Callable[[Graph, fx.Node, int], Wiring | None]]] = {
    ops.PERMUTE: _permute,
    ops.RESHAPE: _reshape,
    ops.SELECT: _select,
    ops.SLICE: _slice,
    ops.GETITEM: _part,
    ops.INDEX_SELECT: _index_select,
    ops.MEAN: _mean,
    ops.ROLL: _roll,
    ops.FLIP: _flip,
    ops.EXPAND: _expand,
    ops.REPEAT: _repeat,
    ops.PAD: _pad,
    ops.RELU: _relu,
    **dict.fromkeys(SPATIAL, _spatial),
}
