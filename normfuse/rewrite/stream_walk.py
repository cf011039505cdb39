"""A whole residual stream as a value: the tensors that one rotation of their channels would turn together.

A walk goes backwards to everything that writes the stream and forwards to everything that reads it. Where it can go
no further it notes why and goes on elsewhere, so that a stream that is left alone is known as well.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod
from typing import Any, Final

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from normfuse.graph import Graph, ops, query
from normfuse.graph.affine import AFFINE, read_affine
from normfuse.report import Reason
from normfuse.rewrite.changes import Blocked
from normfuse.rewrite.commuting import source_of, wirings
from normfuse.rewrite.linear_map import LINEAR_MAPS, read_linear_map
from normfuse.rewrite.streams import caller, pads_with_number

__all__ = ["Stream", "follow"]

MAXIMA: Final = (*ops.MAXIMUM_POOLS, ops.RELU)
"""What commutes with positive scales and with no rotation."""


@dataclass(slots=True)
class Stream:
    """The tensors of a stream with their channel axis, what writes them, what reads them, and where the walk ended.

    Every channel axis holds whole blocks of ``block`` channels. ``constants`` are (reader, constant, axis), the axis
    as sums and concatenations see it, else the constant's own. A map may be among the writers and the readers.
    ``norms`` stand on the stream or, at a border, read it; ``sources`` are norms at a border that write it.
    """

    block: int
    axes: dict[fx.Node, int] = field(default_factory=dict)
    writers: list[fx.Node] = field(default_factory=list)
    readers: list[fx.Node] = field(default_factory=list)
    tables: list[fx.Node] = field(default_factory=list)
    constants: list[tuple[fx.Node, fx.Node, int]] = field(default_factory=list)
    affines: list[fx.Node] = field(default_factory=list)
    norms: list[fx.Node] = field(default_factory=list)
    sums: list[fx.Node] = field(default_factory=list)
    sources: list[fx.Node] = field(default_factory=list)
    blocked: Blocked | None = None


def follow(
    graph: Graph, node: fx.Node, axis: int, block: int, *, borders: Any = None, has_products: bool = True
) -> Stream:
    """Return the stream that ``node`` is part of, its channels along ``axis`` in blocks of ``block``.

    At norms of the kind ``borders`` the stream begins and ends; it goes on through RMS norms without gamma otherwise.
    ``has_products`` lets it go on through products of two tensors, as what is orthogonal may.
    """
    walk = _Walk(graph, Stream(block), borders, has_products)
    walk.join(node, axis, node)
    walk.finish()
    return walk.stream


class _Walk:
    """Follows a stream; what is known of it so far is ``stream``."""

    def __init__(self, graph: Graph, stream: Stream, borders: Any, has_products: bool) -> None:
        self._graph, self._borders, self._has_products = graph, borders, has_products
        self._waiting: list[fx.Node] = []
        self.stream = stream

    def finish(self) -> None:
        """Go on until nothing waits."""
        while self._waiting:
            node = self._waiting.pop()
            axis = self.stream.axes[node]
            self._write(node, axis)
            for reader in query.readers(node):
                self._read(node, reader, axis)

    def join(self, node: fx.Node, axis: int, reader: fx.Node) -> None:
        """Note that ``reader`` reads ``node`` as part of the stream, along ``axis``."""
        stands = self.stream.axes.get(node)
        if query.is_constant(node):
            self._constant(node, axis, reader)
        elif axis < 0 or not self._fits(query.shape(node)[axis]):
            self._end(node, Reason.APART)
        elif stands is not None and stands != axis:
            self._end(node, Reason.AXIS)
        elif stands is None:
            self.stream.axes[node] = axis
            self._waiting.append(node)

    def _constant(self, node: fx.Node, axis: int, reader: fx.Node) -> None:
        is_sum = query.is_call(reader, ops.ADD, ops.SUB)  # it may be one number for all channels
        if not (is_sum or self._fits(query.shape(node)[axis])):
            self._end(node, Reason.APART)
        elif not (is_sum or query.dtype(node).is_floating_point):
            self._end(node, Reason.NO_LINEAR)
        else:
            self.stream.constants.append((reader, node, axis))

    def _fits(self, size: object) -> bool:
        return isinstance(size, int) and size % self.stream.block == 0

    def _end(self, node: fx.Node, reason: Reason) -> None:
        """Note where the walk ends for the first time."""
        self.stream.blocked = self.stream.blocked or Blocked(node, reason)

    def _write(self, node: fx.Node, axis: int) -> None:
        """Note what makes the node, or make its inputs part of the stream."""
        is_last = axis == query.rank(node) - 1
        if query.is_call(node, *LINEAR_MAPS):
            self._map(node, axis, writes=True)
        elif query.is_call(node, ops.EMBEDDING) and query.is_constant(node.args[0]) and is_last:
            self.stream.tables.append(node)
        elif query.is_call(node, *ops.ONLINE_NORMS):
            self._norm(node, is_last)
        elif query.is_call(node, AFFINE):
            self._affine(node, axis)
        elif query.is_call(node, ops.ADD, ops.SUB):
            self._sum(node, axis)
        elif query.is_call(node, ops.CAT):
            for part in node.args[0]:  # type: ignore[union-attr]
                self.join(part, axis, node)  # type: ignore[arg-type]
        elif query.is_call(node, ops.MATMUL) and self._has_products:
            self._product(node, axis)
        else:
            self._view(node, axis)

    def _map(self, node: fx.Node, axis: int, *, writes: bool) -> None:
        linear = read_linear_map(self._graph, node)
        if linear is None:
            self._end(node, Reason.NOT_CONSTANT)
        elif linear.groups > 1:  # a group knows not all channels
            self._end(node, Reason.APART)
        elif axis != (linear.output_axis if writes else linear.input_axis):
            self._end(node, Reason.AXIS)
        else:
            (self.stream.writers if writes else self.stream.readers).append(node)

    def _norm(self, node: fx.Node, is_last: bool) -> None:
        if self._borders is not None:
            self.stream.sources.append(node)
            return
        is_bare = query.argument(node, 2, "weight") is None
        if query.is_call(node, ops.RMS_NORM) and is_bare and is_last and len(node.args[1]) == 1:  # type: ignore[arg-type]
            self.stream.norms.append(node)
            self.join(node.args[0], query.rank(node) - 1, node)  # type: ignore[arg-type]
        else:
            self._end(node, Reason.ONLINE)

    def _border(self, norm: fx.Node, *, is_last: bool) -> None:
        if query.is_call(norm, self._borders) and is_last and len(norm.args[1]) == 1:  # type: ignore[arg-type]
            self.stream.norms.append(norm)
        else:
            self._end(norm, Reason.NONLINEAR_READER)

    def _affine(self, node: fx.Node, axis: int) -> None:
        found = read_affine(self._graph, node).spread()
        if not bool((found.scale == found.scale[0]).all()):
            self._end(node, Reason.CHANNEL_SCALE)
        elif not (found.is_uniform or found.axis == axis):
            self._end(node, Reason.AXIS)
        else:
            self.stream.affines.append(node)
            self.join(node.args[0], axis, node)  # type: ignore[arg-type]

    def _sum(self, node: fx.Node, axis: int) -> None:
        operands = node.args[:2]
        if not all(query.is_tensor(operand) for operand in operands):
            self._end(node, Reason.NO_LINEAR)
            return
        if not any(query.is_constant(operand) for operand in operands):
            self.stream.sums.append(node)
        for operand in operands:
            missing = 0 if query.is_constant(operand) else query.rank(node) - query.rank(operand)  # type: ignore[arg-type]
            self.join(operand, axis - missing, node)  # type: ignore[arg-type]

    def _product(self, node: fx.Node, axis: int) -> None:
        """Go from a product of two tensors to the one that has its channels: (M x) y == M (x y)."""
        behind = axis - query.rank(node)
        operand = {-1: node.args[1], -2: node.args[0]}.get(behind)
        if operand is None or min(query.rank(argument) for argument in node.args) < 2:  # type: ignore[arg-type]
            self._end(node, Reason.NO_LINEAR)
        else:
            self.join(operand, query.rank(operand) + behind, node)  # type: ignore[arg-type]

    def _view(self, node: fx.Node, axis: int) -> None:
        source = source_of(node) if node.op == "call_function" else None
        if source is None or query.is_call(node, *MAXIMA):
            self._end(node, Reason.MODEL_INPUT if node.op == "placeholder" else Reason.NO_LINEAR)
            return
        before = [own for own, after in self._kept_axes(node).items() if after == axis]
        if before and not pads_with_number(node):
            self.join(source, before[0], caller(node))
        else:
            self._end(node, Reason.PADDED_VALUE if before else Reason.APART)

    def _read(self, node: fx.Node, reader: fx.Node, axis: int) -> None:
        """Note what reads the node, or make what it computes part of the stream."""
        if reader.op == "output":
            self._end(reader, Reason.GRAPH_OUTPUT)
        elif query.is_call(reader, *LINEAR_MAPS):
            self._map(reader, axis, writes=False)
        elif query.is_call(reader, *ops.SPLITS, ops.ATEN.unbind.int):
            for part in query.readers(reader):
                self._read(node, part, axis)
        elif query.is_call(reader, *ops.ONLINE_NORMS) and self._borders is not None:
            self._border(reader, is_last=axis == query.rank(node) - 1)
        elif query.is_call(reader, ops.ADD, ops.SUB, ops.CAT, AFFINE, *ops.ONLINE_NORMS):
            self.join(reader, axis + query.rank(reader) - query.rank(node), reader)
        elif query.is_call(reader, ops.MATMUL) and self._has_products:
            self._multiply(node, reader, axis - query.rank(node))
        elif source_of(reader) is not node or query.is_call(reader, *MAXIMA):
            self._end(reader, Reason.NONLINEAR_READER)
        elif (after := self._kept_axes(reader).get(axis)) is None:
            self._end(reader, Reason.APART)
        else:
            self.join(reader, after, reader)

    def _multiply(self, node: fx.Node, reader: fx.Node, behind: int) -> None:
        """Go on to the product, or, where it sums over the channels, to the other factor: (M x) . (M y) == x . y."""
        left, right = factors = reader.args[:2]
        if left is right or behind < -2 or min(query.rank(factor) for factor in factors) < 2:  # type: ignore[arg-type]
            self._end(reader, Reason.NONLINEAR_READER)
        elif (node is left) == (behind == -2):
            self.join(reader, query.rank(reader) + behind, reader)
        elif node is left:
            self.join(right, query.rank(right) - 2, reader)  # type: ignore[arg-type]
        else:
            self.join(left, query.rank(left) - 1, reader)  # type: ignore[arg-type]

    def _kept_axes(self, node: fx.Node) -> dict[int, int]:
        """Return the output axis of every input axis whose blocks arrive whole and in order."""
        block, found = self.stream.block, self._cut_axes(node)
        for axis, wiring in wirings(self._graph, node).items():
            size = wiring.index.numel()
            if size % block == 0 and torch.equal(wiring.index % block, torch.arange(size) % block):
                found[axis] = wiring.axis
        return found

    def _cut_axes(self, node: fx.Node) -> dict[int, int]:
        """Return the axes that a reshape cuts between blocks or joins: as many elements lie behind each channel."""
        if not query.is_call(node, ops.RESHAPE):
            return {}
        before: Any = query.shape(node.args[0])  # type: ignore[arg-type]
        after: Any = query.shape(node)
        return {
            axis: target
            for axis, size in enumerate(before)
            for target, count in enumerate(after)
            if self._fits(size)
            and self._fits(count)
            and statically_known_true(prod(before[axis + 1 :]) == prod(after[target + 1 :]))
        }
