"""Linear maps that are added or applied in a row become one."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, fx

from normfuse.graph import Graph, ops, query
from normfuse.graph.edit import Editor
from normfuse.pipeline import Fact, Pass
from normfuse.report import PassReport
from normfuse.rewrite import Audit, Match, Rule, anything, apply_rules, call
from normfuse.rewrite.linear_map import LinearMap, read_linear_map

__all__ = ["MergeLinearMaps"]


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeLinearMaps(Pass):
    """Make one linear map of two.

        1.  W x + b + V x + d          ->  (W + V) x + (b + d)      parallel branches (RepVGG's, for example)
        2.  W x + b + s B (A x)        ->  (W + s B A) x + b        adapters (LoRA) beside their base
        3.  V (W x + b) + d            ->  V W x + (V b + d)        a chain, where one map costs less than two

    Linear maps, and convolutions without groups: in 1 with the same stride and dilation and kernels about the same
    centre, in 2 and 3 a kernel followed by one of size 1. Nobody else reads what goes. Exact in real arithmetic.
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


class SumOfLinearMaps(Rule[_Merged]):
    """Two linear maps of one tensor, one of them perhaps in two steps, are one (1, 2)."""

    name: ClassVar[str] = "sum-of-linear-maps"
    pattern = call(ops.ADD, args=(anything("left"), anything("right")))

    def plan(self, graph: Graph, match: Match) -> _Merged | None:
        """Return the sum."""
        if match.root.kwargs or match["left"] is match["right"]:
            return None
        left, right = (_branch(graph, match[name]) for name in ("left", "right"))
        if left is None or right is None or left.node.args[0] is not right.node.args[0]:
            return None
        if left.linear.outputs != right.linear.outputs or left.node.target is not right.node.target:
            return None
        large, small = (left, right) if _area(left) >= _area(right) else (right, left)
        weight = _widened(large, small)
        if weight is None:
            return None
        biases = [branch.linear.bias.double() for branch in (large, small) if branch.linear.bias is not None]
        dtype = large.linear.weight.dtype
        bias = sum(biases[1:], biases[0]).to(dtype) if biases else None
        total = replace(large.linear, weight=(large.linear.weight.double() + weight).to(dtype), bias=bias)
        return _Merged(large.node, total) if total.is_finite else None

    def rewrite(self, match: Match, plan: _Merged, edit: Editor) -> None:
        """Let one map compute both."""
        edit.redirect(match.root, _written(edit, plan))

    def describe(self, graph: Graph, match: Match, plan: _Merged) -> dict[str, str]:
        """Say which layers became one."""
        merged = [query.layer_of(match[name]) or match[name].name for name in ("left", "right")]
        return _site(" + ".join(merged), plan.node, "(W + V) x + (b + d)")


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


def _branch(graph: Graph, node: object) -> _Merged | None:
    """Return the linear map of a branch that only the sum reads, two steps taken as one."""
    if not query.is_call(node, ops.LINEAR, *ops.CONVOLUTIONS) or query.only_reader(node) is None:  # type: ignore[arg-type]
        return None
    assert isinstance(node, fx.Node)
    linear, inner = read_linear_map(graph, node), node.args[0]
    if linear is None or linear.groups > 1:
        return None
    if isinstance(inner, fx.Node) and (chained := _chain(graph, inner, node)) is not None:
        return _Merged(inner, chained)
    return _Merged(node, linear)


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


def _area(branch: _Merged) -> int:
    return prod(branch.linear.weight.shape[2:])


def _settings(node: fx.Node, spatial: int) -> tuple[list[int], list[int], list[int]]:
    """Return stride, padding and dilation, one number per spatial axis."""
    found = []
    for index, name, default in ((3, "stride", 1), (4, "padding", 0), (5, "dilation", 1)):
        given = query.argument(node, index, name, default)
        numbers = [int(number) for number in given] if isinstance(given, (list, tuple)) else [int(given)]
        found.append(numbers * spatial if len(numbers) == 1 else numbers)
    return found[0], found[1], found[2]


def _widened(large: _Merged, small: _Merged) -> Tensor | None:
    """Return the smaller kernel in float64 in the middle of one of the larger one's size, or None."""
    spatial = large.linear.weight.ndim - 2
    if spatial <= 0:
        return small.linear.weight.double()
    stride, padding, dilation = _settings(large.node, spatial)
    other_stride, other_padding, other_dilation = _settings(small.node, spatial)
    sides: list[int] = []
    for axis in reversed(range(spatial)):
        difference = large.linear.weight.shape[2 + axis] - small.linear.weight.shape[2 + axis]
        has_dilation = small.linear.weight.shape[2 + axis] > 1
        fits = difference >= 0 and difference % 2 == 0 and stride[axis] == other_stride[axis]
        fits = fits and (not has_dilation or dilation[axis] == other_dilation[axis])
        if not fits or padding[axis] - other_padding[axis] != dilation[axis] * (difference // 2):
            return None
        sides += [difference // 2] * 2
    return F.pad(small.linear.weight.double(), sides)
