"""Rules that write operators of many names in the few that integers know."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import torch
from torch import Tensor, fx

from normfuse.graph import Graph, ops, query
from normfuse.graph.edit import Editor
from normfuse.rewrite.pattern import Match, call
from normfuse.rewrite.rule import Rule

__all__ = ["SPELLING_RULES"]

ATEN = ops.ATEN

MOST_FACTORS: Final = 4
"""A power is written out up to so many factors: every product is rounded."""


class ConvolutionOfOneAxis(Rule[list[Any]]):
    """conv1d(x, W) = conv2d(x, W) with a height of one."""

    name: ClassVar[str] = "convolution-of-one-axis"
    pattern = call(ops.CONV1D)

    def plan(self, graph: Graph, match: Match) -> list[Any] | None:
        """Return stride, padding, dilation and groups; the weight is a constant and there is a batch."""
        node = match.root
        if query.rank(node) != 3 or not query.is_constant(node.args[1]):
            return None
        stride, padding = _number(query.argument(node, 3, "stride", 1)), _number(query.argument(node, 4, "padding", 0))
        dilation = _number(query.argument(node, 5, "dilation", 1))
        return [[1, stride], [0, padding], [1, dilation], query.argument(node, 6, "groups", 1)]

    def rewrite(self, match: Match, plan: list[Any], edit: Editor) -> None:
        """Give tensor and weight a height, and take the result's."""
        node = match.root
        weight = query.operand(node, 1)
        tall = edit.constant(query.constant(edit.graph, weight).unsqueeze(2), str(weight.target), like=weight)
        flat = edit.call(ops.UNSQUEEZE, node.args[0], 2, at=node)
        found = edit.call(ops.CONV2D, flat, tall, query.argument(node, 2, "bias"), *plan, at=node)
        edit.replace(node, ATEN.squeeze.dim, found, 2)


class MaximumOfOneAxis(Rule[list[Any]]):
    """max_pool1d(x) = max_pool2d(x) with a height of one: torch pools no int8 along one axis."""

    name: ClassVar[str] = "maximum-of-one-axis"
    pattern = call(ATEN.max_pool1d.default)

    def plan(self, graph: Graph, match: Match) -> list[Any] | None:
        """Return kernel, stride, padding, dilation, and whether a last part of a window counts; there is a batch."""
        node = match.root
        if query.rank(node) != 3:
            return None
        kernel = _number(query.argument(node, 1, "kernel_size"))
        stride = _number(query.argument(node, 2, "stride") or kernel)
        padding, dilation = (
            _number(query.argument(node, 3, "padding", 0)),
            _number(query.argument(node, 4, "dilation", 1)),
        )
        return [[1, kernel], [1, stride], [0, padding], [1, dilation], query.argument(node, 5, "ceil_mode", False)]

    def rewrite(self, match: Match, plan: list[Any], edit: Editor) -> None:
        """Give the tensor a height, and take the result's."""
        node = match.root
        flat = edit.call(ops.UNSQUEEZE, node.args[0], 2, at=node)
        edit.replace(node, ATEN.squeeze.dim, edit.call(ATEN.max_pool2d.default, flat, *plan, at=node), 2)


class PowerIsProduct(Rule[int]):
    """x^2 = x x, x^3 = x^2 x, x^4 = x^2 x^2."""

    name: ClassVar[str] = "power-is-product"
    pattern = call(ATEN.square.default, ATEN.pow.Tensor_Scalar)

    def plan(self, graph: Graph, match: Match) -> int | None:
        """Return the exponent."""
        node = match.root
        exponent = 2.0 if node.target is ATEN.square.default else float(node.args[1])  # type: ignore[arg-type]
        is_written = exponent in range(2, MOST_FACTORS + 1) and query.is_float(node.args[0])
        return int(exponent) if is_written else None

    def rewrite(self, match: Match, plan: int, edit: Editor) -> None:
        """Multiply."""
        x = match.root.args[0]
        factors = [x, x]
        if plan > 2:
            square = edit.call(ops.MUL, x, x, at=match.root)
            factors = [square, square if plan == 4 else x]
        edit.replace(match.root, ops.MUL, *factors)


class SumIsMean(Rule[int]):
    """sum(x) = C mean(x) over axes of C numbers."""

    name: ClassVar[str] = "sum-is-mean"
    pattern = call(ATEN.sum.dim_IntList)

    def plan(self, graph: Graph, match: Match) -> int | None:
        """Return the number of summands, which must be known."""
        node = match.root
        axes, x = query.argument(node, 1, "dim"), query.operand(node, 0)
        if not axes or query.argument(node, 3, "dtype") is not None or not query.is_float(x):
            return None
        sizes = [query.shape(x)[axis] for axis in axes]
        return math.prod(map(int, sizes)) if all(isinstance(size, int) for size in sizes) else None

    def rewrite(self, match: Match, plan: int, edit: Editor) -> None:
        """Take the mean and multiply it."""
        node = match.root
        keeps = query.argument(node, 2, "keepdim", False)
        mean = edit.call(ops.MEAN, node.args[0], list(query.argument(node, 1, "dim")), keeps, at=node)
        edit.replace(node, ops.MUL, mean, float(plan))


class GateIsProduct(Rule[tuple[int, int]]):
    """glu(x) = first half * sigmoid(second half)."""

    name: ClassVar[str] = "gate-is-product"
    pattern = call(ATEN.glu.default)

    def plan(self, graph: Graph, match: Match) -> tuple[int, int] | None:
        """Return the axis and half its size, which must be known."""
        axis = int(query.argument(match.root, 1, "dim", -1)) % query.rank(match.root)
        half = query.shape(match.root)[axis]
        return (axis, half) if isinstance(half, int) else None

    def rewrite(self, match: Match, plan: tuple[int, int], edit: Editor) -> None:
        """Cut, and multiply."""
        node, (axis, half) = match.root, plan
        first = edit.call(ops.SLICE, node.args[0], axis, 0, half, at=node)
        second = edit.call(ops.SLICE, node.args[0], axis, half, 2 * half, at=node)
        edit.replace(node, ops.MUL, first, edit.call(ATEN.sigmoid.default, second, at=node))


class SlopeIsLeaky(Rule[Tensor]):
    """prelu(x; a) = leaky_relu(x; a) for one a; for one per channel relu(x) - a relu(-x)."""

    name: ClassVar[str] = "slope-is-leaky"
    pattern = call(ATEN.prelu.default)

    def plan(self, graph: Graph, match: Match) -> Tensor | None:
        """Return the slopes, which must be constant."""
        x, slope = match.root.args[:2]
        is_known = query.is_constant(slope) and query.is_float(x)
        return query.constant(graph, slope) if is_known else None  # type: ignore[arg-type]

    def rewrite(self, match: Match, plan: Tensor, edit: Editor) -> None:
        """Call the one function, or add the two sides."""
        node, x = match.root, query.operand(match.root, 0)
        if plan.numel() == 1:
            edit.replace(node, ATEN.leaky_relu.default, x, float(plan))
            return
        along = plan.reshape(-1, *[1] * (query.rank(x) - 2))
        slopes = edit.constant(-along, f"{query.operand(node, 1).target}_along", like=node)
        below = edit.call(ops.RELU, edit.call(ops.NEG, x, at=node), at=node)
        above = edit.call(ops.RELU, x, at=node)
        edit.replace(node, ops.ADD, above, edit.call(ops.MUL, below, slopes, at=node))


class BatchedProduct(Rule[tuple[()]]):
    """bmm(x, y) = matmul(x, y)."""

    name: ClassVar[str] = "batched-product"
    pattern = call(ATEN.bmm.default, ATEN.mm.default)

    def plan(self, graph: Graph, match: Match) -> tuple[()] | None:
        """Return a plan for floats."""
        return () if query.is_float(match.root) else None

    def rewrite(self, match: Match, plan: tuple[()], edit: Editor) -> None:
        """Call matmul."""
        edit.replace(match.root, ops.MATMUL, *match.root.args)


@dataclass(frozen=True, slots=True)
class _Scaled:
    product: fx.Node
    factors: Any
    left: fx.Node


class ScaleBeforeProduct(Rule[_Scaled]):
    """s * (x y) = (s x) y for one s per matrix (a head's own scale of scores), where nobody else reads the product."""

    name: ClassVar[str] = "scale-of-a-matrix-before-product"
    pattern = call(ops.MUL)

    def plan(self, graph: Graph, match: Match) -> _Scaled | None:
        """Return the product and the constant factors, which vary along neither rows nor columns."""
        node = match.root
        if node.kwargs or len(node.all_input_nodes) != 2:
            return None
        product, factors = sorted(node.all_input_nodes, key=query.is_constant)
        if not query.is_call(product, ops.MATMUL) or not query.is_constant(factors):
            return None
        left, sizes = query.operand(product, 0), query.shape(factors)
        is_of_matrices = len(sizes) > 2 and tuple(sizes[-2:]) == (1, 1) and query.rank(factors) <= query.rank(left)
        is_alone = query.only_reader(product) is node and query.shape(product) == query.shape(node)
        return _Scaled(product, factors, left) if is_of_matrices and is_alone and not query.is_constant(left) else None

    def rewrite(self, match: Match, plan: _Scaled, edit: Editor) -> None:
        """Scale the left operand."""
        scaled = edit.call(ops.MUL, plan.left, plan.factors, at=plan.product, like=match.root)
        edit.set_argument(plan.product, 0, scaled)
        edit.redirect(match.root, plan.product)


class WeightedSumIsSum(Rule[float]):
    """add(x, y, alpha) = x + alpha * y."""

    name: ClassVar[str] = "weighted-sum-is-sum"
    pattern = call(ops.ADD, ops.SUB)

    def plan(self, graph: Graph, match: Match) -> float | None:
        """Return the factor of a second tensor, where it is none of 1."""
        alpha = match.root.kwargs.get("alpha", 1)
        return float(alpha) if alpha != 1 and isinstance(match.root.args[1], fx.Node) else None  # type: ignore[arg-type]

    def rewrite(self, match: Match, plan: float, edit: Editor) -> None:
        """Multiply first."""
        node = match.root
        scaled = edit.call(ops.MUL, node.args[1], plan, at=node)
        edit.replace(node, node.target, node.args[0], scaled)


class CausalIsMasked(Rule[Tensor]):
    """attention(q, k, v; causal) = attention(q, k, v; mask) with minus infinity above the diagonal."""

    name: ClassVar[str] = "causal-is-masked"
    pattern = call(ops.ATTENTION)

    def plan(self, graph: Graph, match: Match) -> Tensor | None:
        """Return the mask; both lengths are known."""
        node = match.root
        if not query.argument(node, 5, "is_causal", False) or query.argument(node, 3, "attn_mask") is not None:
            return None
        queries, keys = (query.shape(query.operand(node, index))[-2] for index in (0, 1))
        if not isinstance(queries, int) or not isinstance(keys, int):
            return None
        return torch.full((queries, keys), -math.inf, dtype=query.dtype(node)).triu(1)

    def rewrite(self, match: Match, plan: Tensor, edit: Editor) -> None:
        """Call attention with the mask."""
        node = match.root
        mask = edit.constant(plan, f"{node.name}_mask", like=node)
        kwargs: dict[str, Any] = {
            key: each for key, each in node.kwargs.items() if key not in ("attn_mask", "is_causal")
        }
        dropout = query.argument(node, 4, "dropout_p", 0.0)
        kwargs.pop("dropout_p", None)
        edit.replace(node, ops.ATTENTION, *node.args[:3], mask, dropout, False, **kwargs)


def _number(given: Any) -> Any:
    """Return the one number of an option of one axis."""
    return given[0] if isinstance(given, (list, tuple)) else given


SPELLING_RULES: Final[tuple[Rule[Any], ...]] = (
    ConvolutionOfOneAxis(),
    MaximumOfOneAxis(),
    PowerIsProduct(),
    SumIsMean(),
    WeightedSumIsSum(),
    GateIsProduct(),
    SlopeIsLeaky(),
    BatchedProduct(),
    ScaleBeforeProduct(),
    CausalIsMasked(),
)
