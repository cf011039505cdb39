"""Layer norm becomes RMS norm where everything written to the stream can be centred."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar, Final

import torch
from torch import Tensor, fx

from normfuse.graph import Graph, metadata, ops, query
from normfuse.graph.affine import AFFINE, Affine, read_affine
from normfuse.graph.edit import Editor
from normfuse.pipeline import Fact, Pass
from normfuse.report import PassReport, Reason, Refusal
from normfuse.rewrite import Audit, Match, Rule, apply_rules, call
from normfuse.rewrite.changes import Blocked
from normfuse.rewrite.linear_map import LinearMap, read_linear_map, rebind
from normfuse.rewrite.stream_walk import Stream, follow
from normfuse.rewrite.streams import CENTRED

__all__ = ["RecentreStream"]

_REASONS: Final = {
    Reason.NOT_CONSTANT: Reason.NOT_CONSTANT,
    Reason.GRAPH_OUTPUT: Reason.GRAPH_OUTPUT,
    Reason.NONLINEAR_READER: Reason.STREAM_READER,
    Reason.STREAM_READER: Reason.STREAM_READER,
}
"""What a walk says, in the words of this pass: anything else cannot be centred."""


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
        channels = query.shape(source)[-1]
        if not isinstance(channels, int):
            return Refusal(norm.name, Reason.NOT_STATIC, layer=layer)
        axis = query.rank(source) - 1
        stream = follow(graph, source, axis, channels, borders=ops.LAYER_NORM, has_products=False)
        found = _region(graph, stream)
        return found if isinstance(found, _Region) else Refusal(norm.name, found.reason, found.where, layer)

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


def _region(graph: Graph, stream: Stream) -> _Region | Blocked:
    """Return the stream with its new constants, or what cannot be centred."""
    blocked = stream.blocked or _uncentred(stream)
    if blocked is not None:
        where, axes = blocked.node, stream.axes
        is_read = where.op != "output" and where not in axes and any(node in axes for node in where.all_input_nodes)
        reason = Reason.STREAM_READER if is_read else _REASONS.get(blocked.reason, Reason.UNCENTRED)
        return replace(blocked, reason=reason)
    region = _Region(stream.axes, norms=stream.norms)
    for node in stream.writers:
        linear = read_linear_map(graph, node)
        assert linear is not None
        bias = None if linear.bias is None else _centred(linear.bias, 0)
        outputs = 1 if linear.is_transposed else 0
        region.maps[node] = replace(linear, weight=_centred(linear.weight, outputs), bias=bias)
    for node in stream.tables:
        region.tables[node] = _centred(query.constant(graph, node.args[0]), 1)  # type: ignore[arg-type]
    for reader, old, axis in stream.constants:
        seen = reader if query.is_call(reader, ops.ADD, ops.SUB) else old
        if not (dtype := query.dtype(seen)).is_floating_point:
            return Blocked(old, Reason.UNCENTRED)
        data = query.constant(graph, old).to(dtype)  # a table may hold integers
        centred = _centred_constant(data, axis, query.rank(seen), int(query.shape(seen)[axis]))
        region.constants.append((reader, old, centred, axis))
    for node in stream.affines:
        found = read_affine(graph, node).spread()
        shift = torch.zeros_like(found.shift) if found.is_uniform else found.shift - found.shift.mean()
        region.affines[node] = Affine(found.scale, shift, found.axis)
    return region


def _uncentred(stream: Stream) -> Blocked | None:
    """Return a map that reads the stream, vectors joined, or a norm whose output is the stream and not centred."""
    if stream.readers:
        return Blocked(stream.readers[0], Reason.STREAM_READER)
    for node, axis in stream.axes.items():
        if query.shape(node)[axis] != stream.block:
            return Blocked(node, Reason.UNCENTRED)
    for norm in stream.sources:
        is_layer_norm = query.is_call(norm, ops.LAYER_NORM) and _is_bare(norm)
        is_last = stream.axes[norm] == query.rank(norm) - 1
        if not (is_layer_norm and is_last) and metadata.noted(norm, CENTRED) != stream.axes[norm]:
            return Blocked(norm, Reason.UNCENTRED)
    return None


def _centred(tensor: Tensor, axis: int) -> Tensor:
    """Return the tensor without its mean over ``axis``, computed in float64 and rounded once."""
    wide = tensor.double()
    return (wide - wide.mean(axis, keepdim=True)).to(tensor.dtype)


def _centred_constant(data: Tensor, axis: int, rank: int, size: int) -> Tensor:
    wide = data.reshape([1] * (rank - data.ndim) + list(data.shape))
    shape = [size if index == axis else length for index, length in enumerate(wide.shape)]
    return _centred(wide.expand(shape), axis)
