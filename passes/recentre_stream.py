"""Layer norm becomes RMS norm where everything written to the stream can be centred."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor, fx

from normfuse.graph import Graph, metadata, ops, query
from normfuse.graph.affine import AFFINE, Affine, read_affine
from normfuse.graph.edit import Editor
from normfuse.pipeline import Fact, Pass
from normfuse.report import PassReport, Reason, Refusal
from normfuse.rewrite import Audit, Match, Rule, apply_rules, call
from normfuse.rewrite.changes import Blocked
from normfuse.rewrite.commuting import source_of, wirings
from normfuse.rewrite.linear_map import LINEAR_MAPS, LinearMap, read_linear_map, rebind
from normfuse.rewrite.streams import CENTRED, caller, pads_with_number

__all__ = ["RecentreStream"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RecentreStream(Pass):
    """Subtract the channel mean from everything written to a stream that only layer norms read (methods 4).

        before   layer_norm(W x + b + ...)
        after    rms_norm(W' x + b' + ...),  W' = W - mean of W over its outputs,  b' = b - mean(b)

    "Pre-RMSNorm and Pre-CRMSNorm Transformers" (Jiang et al., 2023, arXiv 2305.14858). Exact in real arithmetic.
    1. Every reader of the stream is a layer norm over its channels, or hands it on: sums, concatenations along other
       axes, views, selections of other axes, means, pooling, interpolation, products with one number. Not a layer norm
       over several vectors joined (Swin's patch merging): it subtracts one mean of all, centring one of each.
    2. Everything written to it is made by linear maps, tables or constants, or is a layer norm's bare output, which is
       centred already. The affine of a norm whose output is the stream cannot be centred.
    3. A layer norm that keeps its own gamma and beta stays as it is: RMS norm has no beta.
    """

    name: ClassVar[str] = "recentre-stream"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.AFFINES, Fact.FOLDED})
    audit: Audit | None = None

    def run(self, graph: Graph) -> PassReport:
        """Apply the rule wherever it holds and say of every layer norm left why it stays."""
        return apply_rules(graph, [LayerNormIsRmsNorm()], name=self.name, audit=self.audit)


@dataclass(slots=True)
class _Region:
    """A stream: its tensors with their channel axis, what is written to it, and the norms that read it."""

    axes: dict[fx.Node, int] = field(default_factory=dict)
    maps: dict[fx.Node, LinearMap] = field(default_factory=dict)
    tables: dict[fx.Node, Tensor] = field(default_factory=dict)
    constants: list[tuple[fx.Node, fx.Node, Tensor, int]] = field(default_factory=list)
    affines: dict[fx.Node, Affine] = field(default_factory=dict)
    norms: list[fx.Node] = field(default_factory=list)


class LayerNormIsRmsNorm(Rule[_Region]):
    """The layer norms of one stream, all at once."""

    name: ClassVar[str] = "layer-norm-is-rms-norm"
    pattern = call(ops.LAYER_NORM)

    def plan(self, graph: Graph, match: Match) -> _Region | Refusal | None:
        """Return the whole stream with its new constants, or what cannot be centred."""
        norm, layer = match.root, query.layer_of(match.root)
        if len(norm.args[1]) > 1:  # type: ignore[arg-type]
            return Refusal(norm.name, Reason.SEVERAL_AXES, layer=layer)
        if not _is_free_of_beta(graph, norm):
            return Refusal(norm.name, Reason.ONLINE, "its beta did not fold, and RMS norm has none", layer)
        source = norm.args[0]
        assert isinstance(source, fx.Node)
        walk = _Walk(graph)
        blocked = walk.stream(source, query.rank(source) - 1, norm)
        if blocked is not None:
            return Refusal(norm.name, blocked.reason, blocked.where, layer)
        return walk.region

    def rewrite(self, match: Match, plan: _Region, edit: Editor) -> None:
        """Write the centred constants and the norms."""
        for node, linear in plan.maps.items():
            rebind(edit, node, linear)
        for node, table in plan.tables.items():
            edit.set_constant(node, 0, table, f"{node.args[0].target}")  # type: ignore[union-attr]
        for reader, old, tensor, axis in plan.constants:
            new = edit.constant(tensor, str(old.target), like=old)
            metadata.note(new, CENTRED, axis)
            edit.substitute(reader, old, new)
        for node, found in plan.affines.items():
            edit.set_constant(node, 2, found.shift, f"{query.layer_of(node) or node.name}.affine")
        for node in (*plan.maps, *plan.tables, *plan.affines):
            metadata.note(node, CENTRED, plan.axes[node])
        for norm in plan.norms:
            if _is_free_of_beta(edit.graph, norm):
                eps = query.argument(norm, 4, "eps", 1e-5)
                new = edit.replace(norm, ops.RMS_NORM, norm.args[0], norm.args[1], None, eps)  # of bare norms only
                metadata.note(new, CENTRED, query.rank(new) - 1)

    def describe(self, graph: Graph, match: Match, plan: _Region) -> dict[str, str]:
        """Say which norms read the stream and which layers write it."""
        norms = [norm for norm in plan.norms if _is_free_of_beta(graph, norm)]
        writers = [*plan.maps, *plan.tables, *(reader for reader, *_ in plan.constants)]
        return {
            "affine": ", ".join(query.layer_of(norm) or norm.name for norm in norms),
            "into": ", ".join(dict.fromkeys(query.layer_of(node) or node.name for node in writers)),
            "formula": "layer norm = RMS norm of the centred stream: W' = W - mean(W), b' = b - mean(b)",
        }


def _is_bare(norm: fx.Node) -> bool:
    one_axis = len(norm.args[1]) == 1  # type: ignore[arg-type]
    return one_axis and query.argument(norm, 2, "weight") is None and query.argument(norm, 3, "bias") is None


def _is_free_of_beta(graph: Graph, norm: fx.Node) -> bool:
    """Return whether the norm is bare and will stay so: an affine that only it feeds goes back into it."""
    reader = query.only_reader(norm)
    if not _is_bare(norm):
        return False
    return not (query.is_call(reader, AFFINE) and bool(read_affine(graph, reader).shift.any()))  # type: ignore[arg-type]


class _Walk:
    """Follows a stream backwards to what writes it and forwards to what reads it."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._waiting: list[tuple[fx.Node, int]] = []
        self.region = _Region()

    def stream(self, node: fx.Node, axis: int, reader: fx.Node) -> Blocked | None:
        """Collect the whole stream that ``reader`` reads as ``node``, or return what cannot be centred."""
        blocked = self._join(node, axis, reader)
        while blocked is None and self._waiting:
            node, axis = self._waiting.pop()
            blocked = self._written(node, axis) or self._read(node, axis)
        return blocked

    def _join(self, node: fx.Node, axis: int, reader: fx.Node) -> Blocked | None:
        """Note that ``node`` must be centred along ``axis``; a constant is at once."""
        if query.is_constant(node):
            is_sum = query.is_call(reader, ops.ADD, ops.SUB)
            rank = query.rank(reader) if is_sum else query.rank(node)
            size = query.shape(reader)[axis] if is_sum else query.shape(node)[axis]
            if not (dtype := query.dtype(reader)).is_floating_point:
                return Blocked(node, Reason.UNCENTRED)
            data = query.constant(self._graph, node).to(dtype)  # a table may hold integers
            centred = _centred_constant(data, axis, rank, int(size))
            self.region.constants.append((reader, node, centred, axis))
            return None
        if node in self.region.axes:
            return None if self.region.axes[node] == axis else Blocked(node, Reason.AXIS)
        self.region.axes[node] = axis
        self._waiting.append((node, axis))
        return None

    def _written(self, node: fx.Node, axis: int) -> Blocked | None:
        """Centre what makes the node, or make its inputs part of the stream."""
        if query.is_call(node, *LINEAR_MAPS):
            return self._linear(node, axis)
        if query.is_call(node, ops.EMBEDDING) and query.is_constant(node.args[0]) and axis == query.rank(node) - 1:
            self.region.tables[node] = _centred(query.constant(self._graph, node.args[0]), 1)  # type: ignore[arg-type]
            return None
        if query.is_call(node, ops.LAYER_NORM) and _is_bare(node) and axis == query.rank(node) - 1:
            return None
        if query.is_call(node, ops.RMS_NORM) and metadata.noted(node, CENTRED) == axis:  # it was such a layer norm
            return None
        if query.is_call(node, AFFINE):
            return self._affine(node, axis)
        if query.is_call(node, ops.ADD, ops.SUB):
            return self._sum(node, axis)
        if query.is_call(node, ops.CAT):
            if int(query.argument(node, 1, "dim", 0)) % query.rank(node) == axis:
                return Blocked(node, Reason.UNCENTRED)
            return next(filter(None, [self._join(part, axis, node) for part in node.args[0]]), None)  # type: ignore[union-attr, arg-type]
        source = source_of(node) if node.op == "call_function" else None
        if source is None or query.is_call(node, *ops.MAXIMUM_POOLS) or pads_with_number(node):
            return Blocked(node, Reason.UNCENTRED)
        before = [index for index, whole in self._whole_axes(node).items() if whole == axis]
        return self._join(source, before[0], caller(node)) if before else Blocked(node, Reason.UNCENTRED)

    def _read(self, node: fx.Node, axis: int) -> Blocked | None:
        """Hand the stream on to its readers."""
        for reader in query.readers(node):
            if query.is_call(reader, ops.LAYER_NORM) and axis == query.rank(node) - 1 and len(reader.args[1]) == 1:  # type: ignore[arg-type]
                self.region.norms.append(reader)
                continue
            blocked = self._handed_on(node, reader, axis)
            if blocked is not None:
                return blocked
        return None

    def _handed_on(self, node: fx.Node, reader: fx.Node, axis: int) -> Blocked | None:
        if reader.op != "call_function" or query.is_call(reader, *LINEAR_MAPS):
            reason = Reason.GRAPH_OUTPUT if reader.op == "output" else Reason.STREAM_READER
            return Blocked(reader, reason, query.layer_of(reader) or reader.name)
        if query.is_call(reader, *ops.SPLITS, ops.ATEN.unbind.int):
            parts = [self._handed_on(node, part, axis) for part in query.readers(reader)]
            return next(filter(None, parts), None)
        if query.is_call(reader, ops.ADD, ops.SUB):
            return self._join(reader, axis + query.rank(reader) - query.rank(node), reader)
        if query.is_call(reader, AFFINE, ops.CAT):
            return self._join(reader, axis, reader)
        if source_of(reader) is None:
            return Blocked(reader, Reason.STREAM_READER, query.layer_of(reader) or reader.name)
        after = self._whole_axes(reader).get(axis)
        return Blocked(reader, Reason.STREAM_READER) if after is None else self._join(reader, after, reader)

    def _whole_axes(self, node: fx.Node) -> dict[int, int]:
        """Return the output axis of every input axis that arrives whole, alone and once.

        Not beside others: layer norm over joined vectors subtracts one mean of all, centring took one from each.
        """
        found = {}
        for axis, wiring in wirings(self._graph, node).items():
            size = query.shape(source_of(node))[axis]  # type: ignore[arg-type]
            if sorted(wiring.index.tolist()) == list(range(int(size))):
                found[axis] = wiring.axis
        return found

    def _linear(self, node: fx.Node, axis: int) -> Blocked | None:
        linear = read_linear_map(self._graph, node)
        if linear is None or axis != linear.output_axis or linear.groups > 1:  # a group knows not all channels
            return Blocked(node, Reason.NOT_CONSTANT if linear is None else Reason.UNCENTRED)
        bias = None if linear.bias is None else _centred(linear.bias, 0)
        outputs = 1 if linear.is_transposed else 0
        self.region.maps[node] = replace(linear, weight=_centred(linear.weight, outputs), bias=bias)
        return None

    def _affine(self, node: fx.Node, axis: int) -> Blocked | None:
        found = read_affine(self._graph, node).spread()
        is_one_scale = bool((found.scale == found.scale[0]).all())
        if not is_one_scale or not (found.is_uniform or found.axis == axis):
            return Blocked(node, Reason.UNCENTRED)
        shift = torch.zeros_like(found.shift) if found.is_uniform else found.shift - found.shift.mean()
        self.region.affines[node] = Affine(found.scale, shift, found.axis)
        return self._join(node.args[0], axis, node)  # type: ignore[arg-type]

    def _sum(self, node: fx.Node, axis: int) -> Blocked | None:
        for operand in node.args[:2]:
            if not isinstance(operand, fx.Node) or not query.is_tensor(operand):
                return Blocked(node, Reason.UNCENTRED)
            own = axis if query.is_constant(operand) else axis - (query.rank(node) - query.rank(operand))
            if own < 0 or (not query.is_constant(operand) and query.shape(operand)[own] != query.shape(node)[axis]):
                return Blocked(node, Reason.UNCENTRED)
            if (blocked := self._join(operand, own, node)) is not None:
                return blocked
        return None


def _centred(tensor: Tensor, axis: int) -> Tensor:
    """Return the tensor without its mean over ``axis``, computed in float64 and rounded once."""
    wide = tensor.double()
    return (wide - wide.mean(axis, keepdim=True)).to(tensor.dtype)


def _centred_constant(data: Tensor, axis: int, rank: int, size: int) -> Tensor:
    wide = data.reshape([1] * (rank - data.ndim) + list(data.shape))
    shape = [size if index == axis else length for index, length in enumerate(wide.shape)]
    return _centred(wide.expand(shape), axis)
