"""Folds an affine into every linear map that reads it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from normfuse.graph import Graph, ops, query
from normfuse.graph.affine import AFFINE, Affine, read_affine
from normfuse.graph.channel import axis_after
from normfuse.graph.edit import Editor
from normfuse.pipeline import Fact, Pass
from normfuse.report import PassReport, Reason, Refusal
from normfuse.rewrite import Match, Rule, apply_rules, call
from normfuse.rewrite.linear_map import LinearMap, read_linear_map, rebind

__all__ = ["FoldAffineIntoConsumers", "fold_before"]


def fold_before(
    weight: Tensor, bias: Tensor | None, *, scale: Tensor, shift: Tensor, groups: int = 1
) -> tuple[Tensor, Tensor]:
    """Return ``W', b'`` with ``W' x + b' == W (scale * x + shift) + b``; axis 1 of W is the input of a group.

    ``scale`` and ``shift`` have one entry per input channel. Computed in float64, rounded once. For a
    convolution it holds wherever the receptive field lies inside the input.
    """
    per_group = weight.shape[1]
    rows = weight.double().reshape(groups, weight.shape[0] // groups, per_group, -1)
    scales, shifts = scale.reshape(groups, 1, per_group, 1), shift.reshape(groups, 1, per_group, 1)
    offset = (rows * shifts).sum(dim=(2, 3)).reshape(-1)
    total = offset if bias is None else offset + bias.double()
    return (rows * scales).reshape(weight.shape).to(weight.dtype), total.to(weight.dtype)


@dataclass(frozen=True, slots=True, kw_only=True)
class FoldAffineIntoConsumers(Pass):
    """Fold an affine into all the linear maps that read it (q, k and v, for example).

        before   y = W (scale * x + shift) + b
        after    y = W' x + b',  W' = W diag(scale),  b' = b + W shift

    Readers are followed through permute, reshape, token selection and the mean over other axes. Exact in
    real arithmetic; rounding differs. Applies where
    1. every reader is a linear map with constant weights,
    2. the channel axis arrives whole at each one's input axis,
    3. no convolution pads with zeros, unless the shift is zero,
    4. the new weights fit into their type (float16 ends at 65504).
    """

    name: ClassVar[str] = "fold-affine-into-consumers"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.AFFINES, Fact.FOLDED})

    def run(self, graph: Graph) -> PassReport:
        """Apply the rule wherever it holds and say of every affine left why it stays."""
        return apply_rules(graph, [FoldBefore()], name=self.name)


@dataclass(frozen=True, slots=True)
class Site:
    """A linear map that reads the affine (perhaps through views), and its new constants."""

    node: fx.Node
    weight: Tensor
    bias: Tensor


class FoldBefore(Rule[tuple[Site, ...]]):
    """linear(affine(x)) is linear, for all readers at once or not at all."""

    name: ClassVar[str] = "fold-before-linear"
    pattern = call(AFFINE)

    def plan(self, graph: Graph, match: Match) -> tuple[Site, ...] | Refusal:
        """Return all the sites, or why one of them is none."""
        found = read_affine(graph, match.root)
        sites: dict[fx.Node, Site] = {}
        for end in _follow(graph, match.root, None if found.is_uniform else found.axis, found):
            if isinstance(end, Refusal):
                return Refusal(match.root.name, end.reason, end.detail, query.layer_of(match.root))
            if end.node in sites:  # both operands, or two paths: the fold would be applied twice
                return Refusal(match.root.name, Reason.SHARED, "one layer reads it twice")
            sites[end.node] = end
        return tuple(sites.values())

    def rewrite(self, match: Match, plan: tuple[Site, ...], edit: Editor) -> None:
        """Give every site its new constants and let the affine's readers read its input."""
        for site in plan:
            rebind(edit, site.node, site.weight, site.bias)
        edit.redirect(match.root, match.root.args[0])  # type: ignore[arg-type]

    def describe(self, match: Match, plan: tuple[Site, ...]) -> dict[str, str]:
        """Say which affine went into which layers."""
        return {
            "affine": query.layer_of(match.root) or match.root.name,
            "into": ", ".join(query.layer_of(site.node) or site.node.name for site in plan),
            "formula": "W' = W diag(a), b' = b + W c",
        }


def _follow(graph: Graph, node: fx.Node, axis: int | None, found: Affine) -> Iterator[Site | Refusal]:
    """Yield the linear maps at the end of every path from ``node``; ``axis`` None stands for uniform."""
    for reader in query.readers(node):
        if reader.op == "output":
            yield Refusal(node.name, Reason.GRAPH_OUTPUT)
        elif query.is_call(reader, ops.LINEAR, *ops.CONVOLUTIONS) and reader.args[0] is node:
            yield _site(graph, reader, axis, found)
        elif query.is_call(reader, *ops.VIEWS, *ops.SELECTIONS, ops.MEAN):
            after = None if axis is None else axis_after(reader, axis)
            if axis is not None and after is None:
                yield Refusal(node.name, Reason.AXIS, f"behind {reader.name}")
            else:
                yield from _follow(graph, reader, after, found)
        else:
            yield Refusal(node.name, _blocked_by(reader), query.layer_of(reader) or reader.name)


def _site(graph: Graph, reader: fx.Node, axis: int | None, found: Affine) -> Site | Refusal:
    linear = read_linear_map(graph, reader)
    if linear is None:
        return Refusal(reader.name, Reason.NOT_CONSTANT, f"the weight of {reader.name}")
    if axis is not None and axis != linear.input_axis:
        return Refusal(reader.name, Reason.AXIS, query.layer_of(reader) or reader.name)
    if linear.pads_with_zeros and bool(torch.any(found.shift != 0)):
        return Refusal(reader.name, Reason.ZERO_PADDING, query.layer_of(reader) or reader.name)
    weight, bias = _folded(linear, found)
    if not bool(weight.isfinite().all() and bias.isfinite().all()):
        return Refusal(reader.name, Reason.OVERFLOW, query.layer_of(reader) or reader.name)
    return Site(reader, weight, bias)


def _folded(linear: LinearMap, found: Affine) -> tuple[Tensor, Tensor]:
    channels = linear.weight.shape[1] * linear.groups
    scale, shift = found.scale.expand(channels), found.shift.expand(channels)
    return fold_before(linear.weight, linear.bias, scale=scale, shift=shift, groups=linear.groups)


def _blocked_by(reader: fx.Node) -> Reason:
    if query.is_call(reader, *ops.TRANSPOSED_CONVOLUTIONS):
        return Reason.TRANSPOSED
    if query.is_call(reader, ops.ADD):
        return Reason.STREAM_READER
    return Reason.NONLINEAR_READER
