"""Linear maps that are added or applied in a row become one."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, fx

from normfuse.graph import Graph, ops, query
from normfuse.graph.affine import AFFINE, read_affine
from normfuse.graph.edit import Editor
from normfuse.pipeline import Fact, Pass
from normfuse.report import PassReport, Reason, Refusal
from normfuse.rewrite import Audit, Match, Rule, anything, apply_rules, call
from normfuse.rewrite.linear_map import LinearMap, read_linear_map

__all__ = ["MergeLinearMaps"]


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeLinearMaps(Pass):
    """Make one linear map of two.

        1.  W x + b + s (V x + d)      ->  (W + s V) x + (b + s d)  parallel branches (RepVGG's, for example)
        2.  W x + b + s B (A x)        ->  (W + s B A) x + b        adapters (LoRA) beside their base
        3.  V (W x + b) + d            ->  V W x + (V b + d)        a chain, where one map costs less than two
        4.  W x + b + s (a x + c)      ->  (W + s diag(a)) x + ...  an affine of x is a linear map as well

    Linear maps, and convolutions without groups: in 1 and 4 with the same stride and dilation and kernels about the
    same centre, in 2 and 3 a kernel followed by one of size 1. Nobody else reads what goes, one map is not more work
    than those it stands for, and its constants fit into their type. Exact in real arithmetic.
    """

    name: ClassVar[str] = "merge-linear-maps"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.AFFINES, Fact.FOLDED})
    audit: Audit | None = None

    def run(self, graph: Graph) -> PassReport:
        """Apply the rules to a fixpoint."""
        rules: list[Rule[Any]] = [SumOfLinearMaps(), ChainOfLinearMaps()]
        return apply_rules(graph, rules, name=self.name, audit=self.audit)


@dataclass(frozen=True, slots=True)
class _Merged:
    """The node that goes on and its new constants."""

    node: fx.Node
    linear: LinearMap


@dataclass(frozen=True, slots=True)
class _Branch:
    """A linear map of ``x`` that a sum reads; ``node`` calls it (an affine of x has none), ``work`` is its price."""

    x: fx.Node
    linear: LinearMap
    node: fx.Node | None
    work: int

    @property
    def area(self) -> int:
        """The number of taps of its kernel."""
        return prod(self.linear.weight.shape[2:])


class SumOfLinearMaps(Rule[_Merged]):
    """Two linear maps of one tensor, one of them perhaps in two steps or an affine, are one (1, 2, 4)."""

    name: ClassVar[str] = "sum-of-linear-maps"
    pattern = call(ops.ADD, ops.SUB, args=(anything("left"), anything("right")))

    def plan(self, graph: Graph, match: Match) -> _Merged | Refusal | None:
        """Return the sum, or why two maps of one tensor cannot be one."""
        alpha = match.root.kwargs.get("alpha", 1)
        found = _branches(graph, match["left"], match["right"])
        if found is None or not isinstance(alpha, (int, float)):
            return None
        if any(query.only_reader(match[name]) is None for name in ("left", "right")):
            return _refusal(match.root, Reason.SHARED)
        left, right = found
        total = _total(left, right, -alpha if match.root.target is ops.SUB else alpha)
        return _refusal(match.root, total) if isinstance(total, Reason) else total

    def rewrite(self, match: Match, plan: _Merged, edit: Editor) -> None:
        """Let one map compute both."""
        edit.redirect(match.root, _written(edit, plan))

    def describe(self, graph: Graph, match: Match, plan: _Merged) -> dict[str, str]:
        """Say which layers became one."""
        merged = [query.layer_of(match[name]) or match[name].name for name in ("left", "right")]
        return _site(" + ".join(merged), plan.node, "(W + s V) x + (b + s d)")


def _refusal(node: fx.Node, reason: Reason) -> Refusal:
    return Refusal(node.name, reason, layer=query.layer_of(node))


class ChainOfLinearMaps(Rule[_Merged]):
    """A linear map of a linear map is one, and computed as one where that is less work (3)."""

    name: ClassVar[str] = "chain-of-linear-maps"
    pattern = call(ops.LINEAR, *ops.CONVOLUTIONS)

    def plan(self, graph: Graph, match: Match) -> _Merged | None:
        """Return the product."""
        outer = read_linear_map(graph, match.root)
        inner_node = match.root.args[0]
        if outer is None or not isinstance(inner_node, fx.Node):
            return None
        found = _chain(graph, inner_node, match.root)
        inner = read_linear_map(graph, inner_node)
        if found is None or inner is None:
            return None
        work = outer.weight.numel() + inner.weight.numel()
        return _Merged(inner_node, found) if found.weight.numel() < work and found.is_finite else None

    def rewrite(self, match: Match, plan: _Merged, edit: Editor) -> None:
        """Let the first map compute both."""
        edit.redirect(match.root, _written(edit, plan))

    def describe(self, graph: Graph, match: Match, plan: _Merged) -> dict[str, str]:
        """Say which layers became one."""
        return _site(query.layer_of(match.root) or match.root.name, plan.node, "V W x + (V b + d)")


def _written(edit: Editor, plan: _Merged) -> fx.Node:
    """Call the merged map beside the one that goes on (its number of outputs may be another one)."""
    node, label = plan.node, str(plan.node.args[1].target).removesuffix(".weight")  # type: ignore[union-attr]
    weight = edit.constant(plan.linear.weight, f"{label}.weight", like=node)
    bias = None if plan.linear.bias is None else edit.constant(plan.linear.bias, f"{label}.bias", like=node)
    options: dict[str, Any] = {key: value for key, value in node.kwargs.items() if key != "bias"}
    return edit.call(node.target, node.args[0], weight, bias, *node.args[3:], at=node, name=f"{node.name}_", **options)


def _site(what: str, into: fx.Node, formula: str) -> dict[str, str]:
    return {"affine": what, "into": query.layer_of(into) or into.name, "formula": formula}


def _branches(graph: Graph, left: object, right: object) -> tuple[_Branch, _Branch] | None:
    """Return the two branches of a sum if they are maps of one tensor and of one kind."""
    found = [_branch(graph, operand) for operand in (left, right)]
    given = found[0] or found[1]
    if left is right or given is None:
        return None
    one, other = (
        branch or _diagonal(graph, operand, given) for branch, operand in zip(found, (left, right), strict=True)
    )
    if one is None or other is None or one.x is not other.x or one.linear.outputs != other.linear.outputs:
        return None
    kinds = {branch.node.target for branch in (one, other) if branch.node is not None}
    return (one, other) if len(kinds) == 1 else None


def _branch(graph: Graph, node: object) -> _Branch | None:
    """Return the linear map of a branch, two steps taken as one."""
    if not isinstance(node, fx.Node) or not query.is_call(node, ops.LINEAR, *ops.CONVOLUTIONS):
        return None
    linear, x = read_linear_map(graph, node), node.args[0]
    if linear is None or not isinstance(x, fx.Node):
        return None
    inner = read_linear_map(graph, x)
    if inner is not None and (chained := _chain(graph, x, node)) is not None:
        return _Branch(x.args[0], chained, x, linear.weight.numel() + inner.weight.numel())  # type: ignore[arg-type]
    return _Branch(x, linear, node, linear.weight.numel())


def _diagonal(graph: Graph, node: object, beside: _Branch) -> _Branch | None:
    """Return an affine of x as a map of the kind that stands beside it, with a kernel of size 1."""
    if not isinstance(node, fx.Node) or not query.is_call(node, AFFINE) or node.args[0] is not beside.x:
        return None
    found, linear = read_affine(graph, node), beside.linear
    if not found.is_uniform and found.axis != linear.input_axis:
        return None
    matrix = found.scale.expand(linear.inputs).diag()
    weight = matrix.reshape(*matrix.shape, *[1] * (linear.weight.ndim - 2))
    shift = found.shift.expand(linear.inputs)
    return _Branch(beside.x, LinearMap(weight, shift, linear.input_axis, linear.output_axis), None, 0)


def _total(left: _Branch, right: _Branch, factor: float) -> _Merged | Reason:
    """Return ``left + factor * right``, computed in float64 and rounded once."""
    if left.linear.groups > 1 or right.linear.groups > 1:
        return Reason.GROUPED
    large, small = sorted((left, right), key=lambda branch: (branch.area, branch.node is not None), reverse=True)
    sides = _sides(large, small)
    if sides is None:
        return Reason.GEOMETRY
    if large.linear.weight.numel() > left.work + right.work:
        return Reason.MORE_WORK
    weights, biases = list[Tensor](), list[Tensor]()
    for branch, number in ((left, 1.0), (right, factor)):
        weights.append(number * F.pad(branch.linear.weight.double(), sides if branch is small else [0] * len(sides)))
        biases += [] if branch.linear.bias is None else [number * branch.linear.bias.double()]
    dtype = query.dtype(large.x)
    bias = sum(biases[1:], biases[0]).to(dtype) if biases else None
    total = replace(large.linear, weight=(weights[0] + weights[1]).to(dtype), bias=bias)
    assert large.node is not None  # an affine comes last among kernels of size 1
    return _Merged(large.node, total) if total.is_finite else Reason.OVERFLOW


def _chain(graph: Graph, inner_node: fx.Node, outer_node: fx.Node) -> LinearMap | None:
    """Return the one map of two in a row, or None where they are none."""
    outer, inner = read_linear_map(graph, outer_node), read_linear_map(graph, inner_node)
    if outer is None or inner is None or query.only_reader(inner_node) is None:
        return None
    if outer_node.target is not inner_node.target or outer.groups > 1 or inner.groups > 1:
        return None
    if outer_node.target is not ops.LINEAR and not _is_pointwise(outer_node, outer):
        return None
    matrix = outer.weight.double().flatten(1)
    weight = (matrix @ inner.weight.double().flatten(1)).reshape(outer.outputs, *inner.weight.shape[1:])
    bias = None if inner.bias is None else matrix @ inner.bias.double()
    if outer.bias is not None:
        bias = outer.bias.double() + (0.0 if bias is None else bias)
    dtype = inner.weight.dtype
    return replace(inner, weight=weight.to(dtype), bias=None if bias is None else bias.to(dtype))


def _is_pointwise(node: fx.Node, linear: LinearMap) -> bool:
    stride = query.argument(node, 3, "stride", 1)
    steps = stride if isinstance(stride, (list, tuple)) else [stride]
    return prod(linear.weight.shape[2:]) == 1 and all(step == 1 for step in steps) and not linear.pads_with_zeros


def _settings(node: fx.Node | None, spatial: int) -> list[tuple[int, int, int]]:
    """Return stride, padding and dilation of every spatial axis."""
    found = []
    for index, name, default in ((3, "stride", 1), (4, "padding", 0), (5, "dilation", 1)):
        given = default if node is None else query.argument(node, index, name, default)
        numbers = [int(number) for number in given] if isinstance(given, (list, tuple)) else [int(given)]
        found.append(numbers * spatial if len(numbers) == 1 else numbers)
    return list(zip(*found, strict=True))


def _sides(large: _Branch, small: _Branch) -> list[int] | None:
    """Return what puts the smaller kernel in the middle of the larger one, as ``pad`` takes it, or None."""
    shape, other_shape = large.linear.weight.shape[2:], small.linear.weight.shape[2:]
    sides: list[int] = []
    for size, other, settings, other_settings in zip(
        shape, other_shape, _settings(large.node, len(shape)), _settings(small.node, len(shape)), strict=True
    ):
        (stride, padding, dilation), (other_stride, other_padding, other_dilation) = settings, other_settings
        around, odd = divmod(size - other, 2)
        fits = around >= 0 and not odd and stride == other_stride and (other == 1 or dilation == other_dilation)
        if not fits or padding - other_padding != dilation * around:
            return None
        sides = [around, around, *sides]  # `pad` begins with the last axis
    return sides
