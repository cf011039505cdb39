"""A centred stream loses its last channel, which is minus the sum of the others."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from normfuse.graph import Graph, metadata, ops, query
from normfuse.graph.affine import AFFINE
from normfuse.graph.edit import Editor
from normfuse.pipeline import Fact, Pass
from normfuse.report import PassReport, Reason, Refusal
from normfuse.rewrite import Audit, Match, Rule, apply_rules, call
from normfuse.rewrite.changes import Blocked
from normfuse.rewrite.commuting import source_of, wirings
from normfuse.rewrite.linear_map import LINEAR_MAPS, LinearMap, read_linear_map
from normfuse.rewrite.streams import CENTRED, CRMS_NORM, caller, pads_with_number, works_along

__all__ = ["CompressStream", "without_last_input", "without_last_output"]

ATEN = ops.ATEN


@dataclass(frozen=True, slots=True, kw_only=True)
class CompressStream(Pass):
    """Compute a stream that `RecentreStream` has centred without its last channel (methods 4.2, step 4).

        before   V rms_norm(W x + b + ...) + c                                                  d channels
        after    V' (z / sqrt((sum(z^2) + sum(z)^2) / d + eps)) + c,  z = W' x + b' + ...        d - 1 channels
                 W', b' = W, b without their last row,  V'[:, j] = V[:, j] - V[:, d]

    "Pre-RMSNorm and Pre-CRMSNorm Transformers" (Jiang et al., 2023, arXiv 2305.14858). Exact in real arithmetic; an odd
    number of channels may well be slower. A norm's output is part of its stream: it sums to zero too.
    1. Everything that writes the stream is a linear map, table, constant or affine that `RecentreStream` has centred.
    2. Every reader is a linear map over the channels, an RMS norm without gamma, or hands the stream on: sums,
       concatenations, views, selections of other axes, means, average pooling, interpolation.
    3. The channels stay on one axis, whole and in order; a view names their number as a number.
    """

    name: ClassVar[str] = "compress-stream"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.AFFINES, Fact.FOLDED})
    audit: Audit | None = None

    def run(self, graph: Graph) -> PassReport:
        """Apply the rule wherever it holds and say of every RMS norm left why it stays."""
        return apply_rules(graph, [StreamLosesChannel()], name=self.name, audit=self.audit)


@dataclass(slots=True)
class _Region:
    """A stream of ``channels``: its tensors with their channel axis, and what each call of it reads from now on."""

    channels: int
    axes: dict[fx.Node, int] = field(default_factory=dict)
    maps: dict[fx.Node, LinearMap] = field(default_factory=dict)
    calls: dict[fx.Node, dict[int, Any]] = field(default_factory=dict)
    constants: dict[tuple[fx.Node, fx.Node], Tensor] = field(default_factory=dict)
    norms: list[fx.Node] = field(default_factory=list)

    def constants_of(self, node: fx.Node) -> dict[fx.Node, Tensor]:
        """Return the new tensors of the constants that a call reads."""
        found = {old: tensor for (reader, old), tensor in self.constants.items() if reader is node}
        if (linear := self.maps.get(node)) is not None:
            found[node.args[1]] = linear.weight  # type: ignore[index]
            if linear.bias is not None:
                found[query.argument(node, 2, "bias")] = linear.bias
        return found


class StreamLosesChannel(Rule[_Region]):
    """The whole stream of an RMS norm, all its norms at once."""

    name: ClassVar[str] = "stream-loses-channel"
    pattern = call(ops.RMS_NORM)

    def plan(self, graph: Graph, match: Match) -> _Region | Refusal | None:
        """Return the whole stream with its new constants, or what needs every channel."""
        norm = match.root
        layer, channels = query.layer_of(norm), query.shape(norm)[-1]
        if not isinstance(channels, int) or channels < 2:
            return Refusal(norm.name, Reason.NOT_STATIC if channels != 1 else Reason.EVERY_CHANNEL, layer=layer)
        walk = _Walk(graph, channels)
        blocked = walk.stream(norm, query.rank(norm) - 1)
        if blocked is not None:
            return Refusal(norm.name, blocked.reason, blocked.where, layer)
        return walk.region

    def rewrite(self, match: Match, plan: _Region, edit: Editor) -> None:
        """Go through the stream in order, so that every call finds its inputs as they will be."""
        readers = [reader for reader, _ in plan.constants]
        for node in sorted({*plan.axes, *plan.maps, *plan.calls, *readers}):
            if query.is_call(node, ops.RMS_NORM):
                _write_norm(edit, node, plan.channels)
                continue
            edit.resize(node, arguments=plan.calls.get(node, {}), constants=plan.constants_of(node))
        for node in (*plan.axes, *(constant for _, constant in plan.constants)):
            metadata.note(node, CENTRED, None)

    def describe(self, graph: Graph, match: Match, plan: _Region) -> dict[str, str]:
        """Say which norms stand on the stream and which layers write and read it."""
        nodes = [*plan.maps, *(reader for reader, _ in plan.constants)]
        return {
            "affine": ", ".join(query.layer_of(norm) or norm.name for norm in sorted(plan.norms)),
            "into": ", ".join(dict.fromkeys(query.layer_of(node) or node.name for node in sorted(nodes))),
            "formula": f"{plan.channels} channels, sum 0, are {plan.channels - 1}: W'[:, j] = W[:, j] - W[:, d]",
        }


def without_last_output(linear: LinearMap) -> LinearMap:
    """Return the map without the last of its outputs."""
    axis, bias = (1 if linear.is_transposed else 0), linear.bias
    return replace(linear, weight=_shortened(linear.weight, axis), bias=None if bias is None else bias[:-1])


def without_last_input(linear: LinearMap) -> LinearMap:
    """Return the map that makes of all inputs but the last what ``linear`` makes of inputs that sum to zero."""
    axis, wide = (0 if linear.is_transposed else 1), linear.weight.double()
    last = wide.narrow(axis, linear.inputs - 1, 1)
    return replace(linear, weight=(_shortened(wide, axis) - last).to(linear.weight.dtype))


def _shortened(tensor: Tensor, axis: int) -> Tensor:
    return tensor.narrow(axis, 0, tensor.shape[axis] - 1)


def _write_norm(edit: Editor, norm: fx.Node, channels: int) -> None:
    """Write ``z / sqrt((sum(z^2) + sum(z)^2) / channels + eps)``, in float32 at least: squares of halves overflow."""
    z, eps, dtype = norm.args[0], query.argument(norm, 3, "eps"), query.dtype(norm)
    eps = torch.finfo(dtype).eps if eps is None else eps
    is_half = dtype in (torch.float16, torch.bfloat16)
    wide = edit.call(ATEN._to_copy.default, z, at=norm, dtype=torch.float32) if is_half else z
    squares = edit.call(ATEN.sum.dim_IntList, edit.call(ops.MUL, wide, wide, at=norm), [-1], True, at=norm)
    total = edit.call(ATEN.sum.dim_IntList, wide, [-1], True, at=norm)
    moment = edit.call(ops.ADD, squares, edit.call(ops.MUL, total, total, at=norm), at=norm)
    shifted = edit.call(ops.ADD, edit.call(ops.DIV, moment, float(channels), at=norm), eps, at=norm)
    root = edit.call(ATEN.sqrt.default, shifted, at=norm)
    if is_half:
        normed = edit.call(ops.DIV, wide, root, at=norm)
        new = edit.replace(norm, ATEN._to_copy.default, normed, dtype=dtype)
    else:
        new = edit.replace(norm, ops.DIV, z, root)
    metadata.note(new, CRMS_NORM, True)


class _Walk:
    """Follows a stream through its norms, backwards to what writes it and forwards to what reads it."""

    def __init__(self, graph: Graph, channels: int) -> None:
        self._graph = graph
        self._waiting: list[fx.Node] = []
        self.region = _Region(channels)

    def stream(self, node: fx.Node, axis: int) -> Blocked | None:
        """Collect the whole stream that ``node`` is part of, or return what needs every channel."""
        blocked = self._join(node, axis, node)
        while blocked is None and self._waiting:
            node = self._waiting.pop()
            axis = self.region.axes[node]
            blocked = self._written(node, axis) or self._read(node, axis)
        return blocked

    def _join(self, node: fx.Node, axis: int, reader: fx.Node) -> Blocked | None:
        """Note that ``reader`` reads ``node`` without the last position of ``axis``; a constant loses it at once."""
        if axis < 0 or query.shape(node)[axis] != self.region.channels:
            return Blocked(node, Reason.EVERY_CHANNEL)
        if query.is_constant(node):
            return self._constant(node, axis, reader)
        if node in self.region.axes:
            return None if self.region.axes[node] == axis else Blocked(node, Reason.AXIS)
        self.region.axes[node] = axis
        self._waiting.append(node)
        return None

    def _constant(self, node: fx.Node, axis: int, reader: fx.Node) -> Blocked | None:
        if metadata.noted(node, CENTRED) != axis:
            return Blocked(node, Reason.UNCENTRED, str(node.target))
        self.region.constants[reader, node] = _shortened(query.constant(self._graph, node), axis)
        return None

    def _written(self, node: fx.Node, axis: int) -> Blocked | None:
        """Shorten what makes the node, or make its inputs part of the stream."""
        if query.is_call(node, *LINEAR_MAPS, ops.EMBEDDING, AFFINE) and metadata.noted(node, CENTRED) != axis:
            return Blocked(node, Reason.UNCENTRED)
        if query.is_call(node, *LINEAR_MAPS):
            self._map_writes(node)
            return None
        if query.is_call(node, ops.EMBEDDING):
            table = node.args[0]
            self.region.constants[node, table] = _shortened(query.constant(self._graph, table), 1)  # type: ignore[arg-type, index]
            return None
        if query.is_call(node, ops.RMS_NORM):
            return self._normed(node, axis)
        if query.is_call(node, AFFINE):
            return self._affine(node, axis)
        if query.is_call(node, ops.ADD, ops.SUB):
            return self._all(node, list(node.args[:2]), axis)
        if query.is_call(node, ops.CAT):
            is_along = int(query.argument(node, 1, "dim", 0)) % query.rank(node) == axis
            return Blocked(node, Reason.EVERY_CHANNEL) if is_along else self._all(node, list(node.args[0]), axis)  # type: ignore[arg-type]
        return self._view(node, axis)

    def _all(self, node: fx.Node, operands: list[Any], axis: int) -> Blocked | None:
        """Make every operand of a sum or concatenation part of the stream."""
        for operand in operands:
            if not query.is_tensor(operand):
                return Blocked(node, Reason.UNCENTRED)
            own = axis - (query.rank(node) - query.rank(operand))
            if (blocked := self._join(operand, own, node)) is not None:
                return blocked
        return None

    def _map_writes(self, node: fx.Node) -> None:
        linear = self._map(node)
        assert linear is not None  # it was centred
        self.region.maps[node] = without_last_output(linear)

    def _normed(self, node: fx.Node, axis: int) -> Blocked | None:
        if query.argument(node, 2, "weight") is not None or len(node.args[1]) != 1 or axis != query.rank(node) - 1:  # type: ignore[arg-type]
            return Blocked(node, Reason.ONLINE)
        self.region.norms.append(node)
        return self._join(node.args[0], axis, node)  # type: ignore[arg-type]

    def _affine(self, node: fx.Node, axis: int) -> Blocked | None:
        """Shorten the shift: the scale is one number, and all that was centred has this axis."""
        for vector in node.args[1:3]:
            data = query.constant(self._graph, vector)  # type: ignore[arg-type]
            if data.numel() > 1:
                self.region.constants[node, vector] = data[:-1]  # type: ignore[index]
        return self._join(node.args[0], axis, node)  # type: ignore[arg-type]

    def _view(self, node: fx.Node, axis: int) -> Blocked | None:
        """Let a view arrange one channel less."""
        source = source_of(node) if node.op == "call_function" else None
        if source is None:
            return Blocked(node, Reason.MODEL_INPUT if node.op == "placeholder" else Reason.EVERY_CHANNEL)
        before = [index for index, after in self._whole_axes(node).items() if after == axis]
        arguments = self._sizes(node, axis)
        if not before or arguments is None or query.is_call(node, *ops.MAXIMUM_POOLS) or pads_with_number(node):
            return Blocked(node, Reason.EVERY_CHANNEL)
        self.region.calls[caller(node)], self.region.calls[node] = {}, arguments
        return self._join(source, before[0], caller(node))

    def _sizes(self, node: fx.Node, axis: int) -> dict[int, Any] | None:
        """Return the arguments that name the number of channels, with one less; None where it is not a number."""
        if not query.is_call(node, ops.RESHAPE, ops.EXPAND):
            return {}
        sizes: list[Any] = list(node.args[1])  # type: ignore[arg-type]
        if not isinstance(sizes[axis], int):
            return None
        sizes[axis] -= sizes[axis] != -1
        return {1: sizes}

    def _whole_axes(self, node: fx.Node) -> dict[int, int]:
        """Return the output axis of every input axis that arrives as it is, whatever its size."""
        along = works_along(node)
        return {
            axis: wiring.axis
            for axis, wiring in wirings(self._graph, node).items()
            if axis not in along and torch.equal(wiring.index, torch.arange(self.region.channels))
        }

    def _read(self, node: fx.Node, axis: int) -> Blocked | None:
        """Hand the stream on to its readers."""
        blocked = (self._handed_on(node, reader, axis) for reader in query.readers(node))
        return next(filter(None, blocked), None)

    def _handed_on(self, node: fx.Node, reader: fx.Node, axis: int) -> Blocked | None:
        if query.is_call(reader, *LINEAR_MAPS):
            return self._map_reads(node, reader, axis)
        if query.is_call(reader, *ops.SPLITS, ATEN.unbind.int):
            parts = (self._handed_on(node, part, axis) for part in query.readers(reader))
            return next(filter(None, parts), None)
        if query.is_call(reader, AFFINE) and metadata.noted(reader, CENTRED) is None:  # behind a norm
            return Blocked(reader, Reason.EVERY_CHANNEL)
        if query.is_call(reader, ops.ADD, ops.SUB, ops.CAT, ops.RMS_NORM, AFFINE):
            return self._join(reader, axis + query.rank(reader) - query.rank(node), reader)
        is_view = reader.op == "call_function" and source_of(reader) is node
        after = self._whole_axes(reader).get(axis) if is_view else None
        if after is None:
            is_output = reader.op == "output"
            return Blocked(reader, Reason.GRAPH_OUTPUT if is_output else Reason.EVERY_CHANNEL)
        return self._join(reader, after, reader)

    def _map_reads(self, node: fx.Node, reader: fx.Node, axis: int) -> Blocked | None:
        linear = self._map(reader)
        if linear is None or linear.groups > 1 or axis != linear.input_axis or reader.args[0] is not node:
            return Blocked(reader, Reason.NOT_CONSTANT if linear is None else Reason.EVERY_CHANNEL)
        shorter = without_last_input(linear)
        if not shorter.is_finite:
            return Blocked(reader, Reason.OVERFLOW)
        self.region.maps[reader] = shorter
        return None

    def _map(self, node: fx.Node) -> LinearMap | None:
        """Return a linear map as it will be: it may both read and write the stream."""
        return self.region.maps.get(node) or read_linear_map(self._graph, node)
