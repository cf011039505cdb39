"""Exact repairs for an affine in front of a convolution that reads zeros which its input does not hold (methods 13.2).

``conv(pad(a x + c))`` is not ``conv'(pad(x))``: the padded zeros should be zeros of ``a x + c``, not of ``x``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import Tensor, fx

from normfuse.graph import Graph, ops, query
from normfuse.graph.affine import Affine, along
from normfuse.graph.edit import Editor
from normfuse.report import Reason
from normfuse.rewrite.linear_map import LinearMap

__all__ = ["NOTHING", "Repair", "choose_repair"]

LARGEST_MAP = 4_000_000
"""Elements of a border map (16 MB in float32): beyond that the file pays more than the fold saves."""


@dataclass(frozen=True, slots=True)
class Repair:
    """Nothing, a border map to add behind the convolution, or a value per channel to pad with in front of it."""

    border: Tensor | None = None
    values: Tensor | None = None
    amounts: tuple[int, ...] = ()

    @property
    def how(self) -> str:
        """The repair in words."""
        if self.border is not None:
            return "border correction added behind the convolution"
        return "padded with -c / a instead of 0" if self.values is not None else ""

    def scaled(self, behind: Affine, axis: int) -> Repair:
        """Return the repair where the convolution's output gets an affine as well."""
        if self.border is None:
            return self
        return replace(self, border=self.border * along(behind.scale, axis, self.border.ndim))

    def fits(self, dtype: torch.dtype) -> bool:
        """Return whether ``dtype`` holds the border map (float16 ends at 65504)."""
        return self.border is None or bool(self.border.to(dtype).isfinite().all())

    def write(self, edit: Editor, node: fx.Node) -> None:
        """Change the graph around the convolution, whose constants are the folded ones already."""
        if self.border is not None:
            data = self.border.to(query.dtype(node))
            border = edit.constant(data, f"{query.layer_of(node) or node.name}.border", like=node)
            total = edit.call(ops.ADD, node, border, at=node, after=True)
            edit.redirect(node, total, only=lambda reader: reader is not total)
        if self.values is not None:
            _pad_with(edit, node, self.values, self.amounts)


NOTHING = Repair()


def choose_repair(graph: Graph, node: fx.Node, linear: LinearMap, found: Affine) -> Repair | Reason:
    """Return the repair that moves the fewest elements, or why there is none.

    A border map needs static sizes and moves the output once; padding with ``-c / a`` needs a scale that is not
    zero and moves the input once per padded axis (once in all where every channel has the same value).
    """
    if not bool(found.shift.any()) or not (linear.pads_with_zeros or linear.is_transposed):
        return NOTHING
    options: list[tuple[float, Repair]] = []
    size = query.shape(node)[linear.output_axis :]
    if all(isinstance(number, int) for number in query.shape(_input(node))[linear.input_axis :]):
        border = _border(node, linear, found)
        if border is None:
            return NOTHING
        if border.numel() <= LARGEST_MAP:
            options.append((float(prod(size)), Repair(border=border)))
    if (values := _values(linear, found, query.dtype(node))) is not None:
        repair = Repair(values=values, amounts=tuple(_amounts(node, linear)))
        options.append((_padding_cost(node, linear, values), repair))
    if options:
        return min(options, key=lambda option: option[0])[1]
    return Reason.TRANSPOSED if linear.is_transposed else Reason.ZERO_PADDING


def _input(node: fx.Node) -> fx.Node:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    return source


def _border(node: fx.Node, linear: LinearMap, found: Affine) -> Tensor | None:
    """Return what the folded bias misses at every position, [1, out, ...] in float64, or None if it misses nothing."""
    spatial = [int(size) for size in query.shape(_input(node))[linear.input_axis + 1 :]]
    rank = linear.weight.ndim
    image = along(found.shift.expand(linear.inputs), 1, rank).expand(1, -1, *spatial)
    true: Tensor = node.target(image, linear.weight.double(), None, *node.args[3:], **node.kwargs)  # type: ignore[operator]
    taken = replace(linear, weight=linear.weight.double(), bias=None).before(found).bias  # what the folded bias holds
    assumed = along(torch.zeros(1, dtype=torch.float64) if taken is None else taken, 1, rank)
    missed = true - assumed
    rounding = 1e-12 * max(float(true.abs().max()), 1.0)
    if bool((missed.abs() <= rounding).all()):
        return None
    return missed if linear.input_axis == 1 else missed.squeeze(0)


def _values(linear: LinearMap, found: Affine, dtype: torch.dtype) -> Tensor | None:
    """Return ``-c / a`` per channel, or None where it is no number."""
    scale, shift = found.scale.expand(linear.inputs), found.shift.expand(linear.inputs)
    if linear.is_transposed or bool(((scale == 0) & (shift != 0)).any()):
        return None
    values = torch.where(shift == 0, 0.0, -shift / torch.where(scale == 0, 1.0, scale))
    return values if bool(values.to(dtype).isfinite().all()) else None


def _amounts(node: fx.Node, linear: LinearMap) -> list[int]:
    """Return the padding of every spatial axis, the same on both sides."""
    padding = query.argument(node, 4, "padding", 0)
    given = list(padding) if isinstance(padding, (list, tuple)) else [padding]
    return given * (linear.weight.ndim - 2) if len(given) == 1 else given


def _padding_cost(node: fx.Node, linear: LinearMap, values: Tensor) -> float:
    elements = prod(size if isinstance(size, int) else 1 for size in query.shape(_input(node))[linear.input_axis :])
    copies = 1 if bool((values == values[0]).all()) else 2 * sum(amount > 0 for amount in _amounts(node, linear))
    return float(elements * copies)


def _pad_with(edit: Editor, node: fx.Node, values: Tensor, amounts: tuple[int, ...]) -> None:
    """Pad in front of the convolution and let it pad nothing."""
    source, rank = _input(node), query.rank(node)
    spatial = len(amounts)
    label = query.layer_of(node) or node.name
    if bool((values == values[0]).all()):
        sides = [amount for amount in reversed(amounts) for _ in range(2)]
        source = edit.call(ops.PAD, source, sides, "constant", float(values[0]), at=node)
    else:
        column = along(values.to(query.dtype(node)), rank - spatial - 1, rank)
        border = edit.constant(column, f"{label}.padding", like=node)
        for axis, amount in zip(range(rank - spatial, rank), amounts, strict=True):
            if amount:
                source = _with_borders(edit, node, source, border, axis, amount)
    edit.set_argument(node, 0, source)
    edit.set_argument(node, 4, [0] * spatial)


def _with_borders(edit: Editor, at: fx.Node, source: fx.Node, border: fx.Node, axis: int, amount: int) -> fx.Node:
    sizes: list[Any] = list(query.shape(source))
    sizes[axis] = amount
    for position, size in enumerate(sizes):
        if not isinstance(size, int):
            sizes[position] = edit.call(ops.ATEN.sym_size.int, source, position, at=at)
    side = edit.call(ops.EXPAND, border, sizes, at=at)
    return edit.call(ops.CAT, [side, source, side], axis, at=at)
