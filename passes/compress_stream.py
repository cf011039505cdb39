"""A centred stream loses its last channel, which is minus the sum of the others."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Final

import torch
from torch import Tensor, fx

from normfuse.graph import Graph, metadata, ops, query
from normfuse.graph.edit import Editor
from normfuse.pipeline import Fact, Pass
from normfuse.report import PassReport, Reason, Refusal
from normfuse.rewrite import Audit, Match, Rule, apply_rules, call
from normfuse.rewrite.changes import Blocked
from normfuse.rewrite.commuting import source_of
from normfuse.rewrite.linear_map import LinearMap, read_linear_map
from normfuse.rewrite.stream_walk import Stream, follow
from normfuse.rewrite.streams import CENTRED, CRMS_NORM, caller, works_along

__all__ = ["CompressStream", "without_last_input", "without_last_output"]

ATEN = ops.ATEN

_SAID: Final = {
    Reason.UNCENTRED,
    Reason.NOT_CONSTANT,
    Reason.MODEL_INPUT,
    Reason.GRAPH_OUTPUT,
}
"""What says more of why a stream stays than that it needs every channel."""


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
        found = _region(graph, follow(graph, norm, query.rank(norm) - 1, channels, has_products=False))
        return found if isinstance(found, _Region) else Refusal(norm.name, found.reason, found.where, layer)

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


def _region(graph: Graph, stream: Stream) -> _Region | Blocked:
    """Return what a stream becomes, or what needs every channel."""
    blocked = stream.blocked or _uncut(graph, stream) or _uncentred(stream)
    if blocked is not None:
        return blocked if blocked.reason in _SAID else replace(blocked, reason=Reason.EVERY_CHANNEL)
    region = _Region(stream.block, axes=stream.axes, norms=stream.norms)
    for node in (*stream.writers, *stream.readers):
        linear = region.maps.get(node) or read_linear_map(graph, node)
        assert linear is not None
        is_written = node in stream.writers and node not in region.maps
        region.maps[node] = without_last_output(linear) if is_written else without_last_input(linear)
        if not region.maps[node].is_finite:
            return Blocked(node, Reason.OVERFLOW)
    _shorten_constants(graph, stream, region)
    for node in stream.axes:
        region.calls[caller(node)] = {}
        region.calls[node] = _sizes(node, stream.axes[node]) or {}
    return region


def _shorten_constants(graph: Graph, stream: Stream, region: _Region) -> None:
    constants = [*stream.constants, *((node, node.args[0], 1) for node in stream.tables)]
    for reader, old, axis in constants:
        region.constants[reader, old] = _shortened(query.constant(graph, old), axis)  # type: ignore[arg-type, index]
    for node in stream.affines:
        for vector in node.args[1:3]:
            data = query.constant(graph, vector)  # type: ignore[arg-type]
            if data.numel() > 1:  # the shift: the scale is one number
                region.constants[node, vector] = data[:-1]  # type: ignore[index]


def _uncentred(stream: Stream) -> Blocked | None:
    """Return what writes the stream without having been centred (1)."""
    written = [(node, stream.axes[node]) for node in (*stream.writers, *stream.tables, *stream.affines)]
    both = [*written, *((constant, axis) for _, constant, axis in stream.constants)]
    return next((Blocked(node, Reason.UNCENTRED) for node, axis in both if metadata.noted(node, CENTRED) != axis), None)


def _uncut(graph: Graph, stream: Stream) -> Blocked | None:
    """Return where the channels are not on one axis, whole and in order, whatever their number (3)."""
    for node, axis in stream.axes.items():
        source = source_of(node)
        cuts = source is not None and stream.axes.get(source) in works_along(node)
        if query.shape(node)[axis] != stream.block or cuts or _sizes(node, axis) is None:
            return Blocked(node, Reason.EVERY_CHANNEL)
    return None


def _sizes(node: fx.Node, axis: int) -> dict[int, Any] | None:
    """Return the arguments that name the number of channels, with one less; None where it is not a number."""
    if not query.is_call(node, ops.RESHAPE, ops.EXPAND):
        return {}
    sizes: list[Any] = list(node.args[1])  # type: ignore[arg-type]
    if not isinstance(sizes[axis], int):
        return None
    sizes[axis] -= sizes[axis] != -1
    return {1: sizes}
