"""A stream whose channels an orthogonal matrix turns: its new constants, computed first and written together."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Final

import torch
from torch import Tensor, fx

from normfuse.graph import Graph, metadata, ops, query
from normfuse.graph.affine import Affine, read_affine
from normfuse.graph.edit import Editor
from normfuse.report import Reason, Refusal
from normfuse.rewrite.changes import Blocked
from normfuse.rewrite.hadamard import rotation
from normfuse.rewrite.linear_map import LinearMap, read_linear_map, rebind
from normfuse.rewrite.stream_walk import Stream
from normfuse.rewrite.streams import CENTRED

__all__ = [
    "LOUDEST",
    "ROTATED",
    "Rotated",
    "loudness",
    "randomly_rotated",
    "rotate_inputs",
    "rotate_outputs",
    "rotated",
    "turn",
]

ROTATED: Final = "rotated"
"""Noted of everything that was turned: a second time would be another rotation."""

SMALLEST: Final = 8
"""Fewer channels than this have next to no outliers to even out."""

LOUDEST: Final = 2.0**8
"""Beyond it, rounding a turned stream to eight bits adds more than what a reader reads."""


@dataclass(slots=True)
class Rotated:
    """The new constants of a stream."""

    stream: Stream
    maps: dict[fx.Node, LinearMap] = field(default_factory=dict)
    tables: dict[fx.Node, Tensor] = field(default_factory=dict)
    constants: dict[tuple[fx.Node, fx.Node], Tensor] = field(default_factory=dict)
    affines: dict[fx.Node, Affine] = field(default_factory=dict)

    def write(self, edit: Editor) -> None:
        """Give every node its new constants; what was centred is so no longer."""
        for node, linear in self.maps.items():
            rebind(edit, node, linear)
        for node, table in self.tables.items():
            edit.set_constant(node, 0, table, f"{node.args[0].target}")  # type: ignore[union-attr]
        for (reader, old), tensor in self.constants.items():
            edit.substitute(reader, old, edit.constant(tensor, str(old.target), like=old))
        for node, found in self.affines.items():
            edit.set_constant(node, 2, found.shift, f"{query.layer_of(node) or node.name}.affine")
            edit.set_argument(node, 3, found.axis)
        for node in self.stream.axes:
            metadata.note(node, CENTRED, None)
            metadata.note(node, ROTATED, True)

    @property
    def taken_by(self) -> str:
        """The layers whose constants change, in the order of the graph."""
        nodes = sorted({*self.maps, *self.tables, *self.affines, *(reader for reader, _ in self.constants)})
        return ", ".join(dict.fromkeys(query.layer_of(node) or node.name for node in nodes))


def randomly_rotated(graph: Graph, stream: Stream, at: fx.Node, seed: int) -> Rotated | Refusal:
    """Return a stream as it is for the seed's rotation of its blocks, or why what was found at a node stays."""
    layer = query.layer_of(at)
    if stream.block < SMALLEST:
        return Refusal(at.name, Reason.TOO_SMALL, f"{stream.block} channels", layer)
    found = rotated(graph, stream, rotation(stream.block, seed))
    return found if isinstance(found, Rotated) else Refusal(at.name, found.reason, found.where, layer)


def rotated(graph: Graph, stream: Stream, matrix: Tensor) -> Rotated | Blocked:
    """Return everything that writes or reads a stream as it is for the stream ``matrix @ x``, or what cannot be.

    Exact in real arithmetic for an orthogonal matrix; computed in float64 and rounded once, to each constant's type.
    """
    if stream.blocked is not None:
        return stream.blocked
    for node, ratio in loudness(graph, stream).items():
        if ratio > LOUDEST:
            return Blocked(node, Reason.RANGE)
    found = Rotated(stream)
    for node in stream.writers:
        found.maps[node] = rotate_outputs(_map(graph, found, node), matrix)
    for node in stream.readers:
        found.maps[node] = rotate_inputs(_map(graph, found, node), matrix)
    for node in stream.tables:
        table = query.constant(graph, node.args[0])  # type: ignore[arg-type]
        found.tables[node] = turn(table, matrix, 1).to(table.dtype)
    for reader, old, axis in stream.constants:
        found.constants[reader, old] = _constant(graph, reader, old, axis, matrix)
    for node in stream.affines:
        own, axis = read_affine(graph, node).spread(), stream.axes[node]
        shift = turn(own.shift.expand(int(query.shape(node)[axis])), matrix, 0)
        found.affines[node] = Affine(own.scale[:1], shift, axis)
    return _too_large(found) or found


def loudness(graph: Graph, stream: Stream) -> dict[fx.Node, float]:
    """Return how much louder what rounding adds to a stream reaches each reader once the channels are mixed.

    An error of every channel is as large as the stream as a whole then, and every reader reads it with the whole of
    its weight: sqrt(sum(x^2) sum(w^2) / (n sum(x^2 w^2))), x^2 taken from what is written. It is about 1, less where
    a reader leaves large channels out, and large where it amplifies small ones (behind norms with dead channels).
    """
    written = [_power(linear.weight, 1 if linear.is_transposed else 0) for linear in _maps(graph, stream.writers)]
    written += [_power(linear.bias, 0) for linear in _maps(graph, stream.writers) if linear.bias is not None]
    written += [_power(query.constant(graph, node.args[0]), 1) / query.shape(node.args[0])[0] for node in stream.tables]  # type: ignore[arg-type]
    power = torch.stack([vector.reshape(-1, stream.block).sum(0) for vector in written]).sum(0)
    found = {}
    for node, linear in zip(stream.readers, _maps(graph, stream.readers), strict=True):
        weight = _power(linear.weight, 0 if linear.is_transposed else 1).reshape(-1, stream.block).sum(0)
        if weight.any():
            found[node] = float((power.mean() * weight.sum() / (power * weight).sum()).sqrt())
    return found


def _maps(graph: Graph, nodes: list[fx.Node]) -> list[LinearMap]:
    return [linear for node in nodes if (linear := read_linear_map(graph, node)) is not None]


def _power(tensor: Tensor, axis: int) -> Tensor:
    """Return the sum of the squares of every channel."""
    return tensor.double().movedim(axis, 0).flatten(1).square().sum(1) if tensor.ndim > 1 else tensor.double().square()


def turn(tensor: Tensor, matrix: Tensor, axis: int) -> Tensor:
    """Return ``matrix @ block`` for every block of channels along ``axis``, in float64."""
    last = tensor.double().movedim(axis, -1)
    blocks = last.reshape(*last.shape[:-1], -1, matrix.shape[0])
    return (blocks @ matrix.T).reshape(last.shape).movedim(-1, axis)


def rotate_outputs(linear: LinearMap, matrix: Tensor) -> LinearMap:
    """Return the map ``matrix @ (W x + b)``."""
    weight = turn(linear.weight, matrix, 1 if linear.is_transposed else 0).to(linear.weight.dtype)
    bias = None if linear.bias is None else turn(linear.bias, matrix, 0).to(linear.bias.dtype)
    return replace(linear, weight=weight, bias=bias)


def rotate_inputs(linear: LinearMap, matrix: Tensor) -> LinearMap:
    """Return the map that makes of ``matrix @ x`` what ``linear`` makes of x: the rows of W turn as x does."""
    return replace(linear, weight=turn(linear.weight, matrix, 0 if linear.is_transposed else 1).to(linear.weight.dtype))


def _map(graph: Graph, found: Rotated, node: fx.Node) -> LinearMap:
    """Return a map as it will be: it may both write and read the stream."""
    linear = found.maps.get(node) or read_linear_map(graph, node)
    assert linear is not None  # the walk has read it
    return linear


def _constant(graph: Graph, reader: fx.Node, old: fx.Node, axis: int, matrix: Tensor) -> Tensor:
    data = query.constant(graph, old)
    if not query.is_call(reader, ops.ADD, ops.SUB):
        return turn(data, matrix, axis).to(data.dtype)
    shape = [1] * (query.rank(reader) - data.ndim) + list(data.shape)
    wide = data.reshape(shape)
    shape[axis] = int(query.shape(reader)[axis])  # one number for all channels is one for each
    return turn(wide.expand(shape), matrix, axis).to(query.dtype(reader))


def _too_large(found: Rotated) -> Blocked | None:
    for node, linear in found.maps.items():
        if not linear.is_finite:
            return Blocked(node, Reason.OVERFLOW)
    for node, total in found.affines.items():
        if not total.fits(query.dtype(node)):
            return Blocked(node, Reason.OVERFLOW)
    tensors = [*found.tables.items(), *((reader, tensor) for (reader, _), tensor in found.constants.items())]
    for node, tensor in tensors:
        if not bool(torch.isfinite(tensor).all()):
            return Blocked(node, Reason.OVERFLOW)
    return None
