"""Rules that write a division by a vector's own length as the RMS norm that it is."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import torch
from torch import fx

from normfuse.graph import Graph, ops, query
from normfuse.graph.edit import Editor
from normfuse.rewrite.pattern import Match, call
from normfuse.rewrite.rule import Rule

__all__ = ["UNIT_LENGTH_RULES"]

ATEN = ops.ATEN

LENGTHS: Final = (ATEN.linalg_vector_norm.default, ATEN.linalg_norm.default, ATEN.norm.ScalarOpt_dim)
CLAMPS: Final = (ATEN.clamp_min.default, ATEN.clamp.default)

MOST_BOUND: Final = 1e-3
"""The largest bound of a length that an eps may stand for: a vector a thousand times as long (for the bounds that are
in use, a vector of length one) feels 5e-7 of it."""

MOST_ADDED: Final = 1e-5
"""The largest number added to a length, which every vector feels at first order: one of length one by as much."""


@dataclass(frozen=True, slots=True)
class _Length:
    """``sqrt(sum(x^2) + eps)`` over one axis, which is kept."""

    x: fx.Node
    axis: int
    eps: float


class UnitLengthIsRms(Rule[_Length]):
    """x / sqrt(sum(x^2) + eps) = rms_norm(x; gamma = 1 / sqrt(C), eps / C) over C channels.

    A bound of the length from below, or what is added to it, is its own square as eps: equal up to rounding for
    vectors a thousand (a million) times as long, and of 0 both make 0. Where nothing is added 0 / 0 becomes 0.
    """

    name: ClassVar[str] = "unit-length-is-rms"
    pattern = call(ops.DIV, ops.MUL)

    def plan(self, graph: Graph, match: Match) -> _Length | None:
        """Return what is divided by its length, along which axis."""
        node = match.root
        if node.kwargs or not all(query.is_tensor(operand) for operand in node.args):
            return None
        pairs = [node.args[:2]] if node.target is ops.DIV else [node.args[:2], node.args[1::-1]]
        for x, length in pairs:
            found = _over(graph, length) if node.target is ops.MUL else _length(graph, length)
            if found is not None and found.x is x and query.is_float(x) and _meets(found, length):
                return found
        return None

    def rewrite(self, match: Match, plan: _Length, edit: Editor) -> None:
        """Call the norm, over the last axis."""
        rank, x = query.rank(plan.x), plan.x
        turn = [axis for axis in range(rank) if axis != plan.axis] + [plan.axis]
        is_last = plan.axis == rank - 1
        if not is_last:
            x = edit.call(ops.PERMUTE, x, turn, at=match.root)
        width, kind = int(query.shape(x)[-1]), query.dtype(x)
        gamma = edit.constant(
            torch.full((width,), width**-0.5, dtype=kind), f"{match.root.name}_length", like=match.root
        )
        eps = max(plan.eps / width, torch.finfo(kind).tiny)  # or a vector of zeros would be no number
        norm = edit.call(ops.RMS_NORM, x, [width], gamma, eps, at=match.root)
        if not is_last:
            norm = edit.call(ops.PERMUTE, norm, [turn.index(axis) for axis in range(rank)], at=match.root)
        edit.redirect(match.root, norm)


class CosineIsProduct(Rule[int]):
    """cosine_similarity(x, y) = sum(x / |x| * y / |y|)."""

    name: ClassVar[str] = "cosine-is-product"
    pattern = call(ATEN.cosine_similarity.default)

    def plan(self, graph: Graph, match: Match) -> int | None:
        """Return the axis; both have the same shape."""
        x, y = match.root.args[:2]
        if not query.is_float(x) or not query.is_float(y) or query.shape(x) != query.shape(y):  # type: ignore[arg-type]
            return None
        return int(query.argument(match.root, 2, "dim", 1))

    def rewrite(self, match: Match, plan: int, edit: Editor) -> None:
        """Divide both by their lengths; these quotients become norms."""
        node = match.root
        bound = float(query.argument(node, 3, "eps", 1e-8))
        units = []
        for x in node.args[:2]:
            length = edit.call(LENGTHS[0], x, 2, [plan], True, at=node)
            units.append(edit.call(ops.DIV, x, edit.call(CLAMPS[0], length, bound, at=node), at=node))
        product = edit.call(ops.MUL, *units, at=node)
        edit.replace(node, ATEN.sum.dim_IntList, product, [plan])


def _meets(found: _Length, length: Any) -> bool:
    """Return whether a length stands at every element of the vector it belongs to."""
    wanted = [1 if axis == found.axis else size for axis, size in enumerate(query.shape(found.x))]
    source = length
    while query.is_call(source, ops.EXPAND):
        source = query.operand(source, 0)
    is_alike = list(query.shape(source)) == wanted and query.dtype(source) == query.dtype(found.x)
    return is_alike and isinstance(query.shape(found.x)[found.axis], int)


def _over(graph: Graph, node: Any) -> _Length | None:
    """Return the length that ``node`` is one over."""
    node = _spread(node)
    if query.is_call(node, ops.MUL) and node.args[1] == 1:
        node = node.args[0]
    if query.is_call(node, ATEN.reciprocal.default):
        return _length(graph, node.args[0])
    is_root = query.is_call(node, ATEN.rsqrt.default) or _is_power(node, -0.5)
    return _square(graph, node.args[0]) if is_root else None


def _length(graph: Graph, node: Any) -> _Length | None:
    """Return the length that ``node`` is, bounded or raised a little or not."""
    node = _spread(node)
    if query.is_call(node, *LENGTHS):
        order = node.args[1] if len(node.args) > 1 else 2
        return _over_one_axis(node.args[0], query.argument(node, 2, "dim")) if order in (2, None) else None
    if query.is_call(node, ATEN.sqrt.default) or _is_power(node, 0.5):
        return _square(graph, node.args[0])
    found, eps = _raised(graph, node, MOST_BOUND, MOST_ADDED)
    length = None if found is None else _length(graph, found)
    return None if length is None or length.eps else _Length(length.x, length.axis, eps**2)


def _square(graph: Graph, node: Any) -> _Length | None:
    """Return the length that ``node`` is the square of."""
    node = _spread(node)
    if query.is_call(node, ATEN.sum.dim_IntList):
        x = _root(node.args[0])
        return None if x is None else _over_one_axis(x, query.argument(node, 1, "dim"))
    found, eps = _raised(graph, node, MOST_BOUND**2, math.inf)
    square = None if found is None else _square(graph, found)
    return None if square is None or square.eps else _Length(square.x, square.axis, eps)


def _raised(graph: Graph, node: Any, most_bound: float, most_added: float) -> tuple[fx.Node | None, float]:
    """Return what ``node`` bounds from below, or adds to, and by which small number."""
    if query.is_call(node, *CLAMPS):
        source, bound, most = node.args[0], query.argument(node, 1, "min"), most_bound
        if query.argument(node, 2, "max") is not None:
            return None, 0.0
    elif query.is_call(node, ATEN.maximum.default, ops.ADD) and not node.kwargs:
        source, bound = sorted(node.args[:2], key=lambda each: _number(graph, each) is not None)
        most = most_added if node.target is ops.ADD else most_bound
    else:
        return None, 0.0
    eps = _number(graph, bound)
    return (source, eps) if eps is not None and 0 <= eps <= most else (None, 0.0)


def _number(graph: Graph, value: Any) -> float | None:
    """Return the number that an argument is, or its one element."""
    if isinstance(value, (int, float)):
        return float(value)
    if not query.is_constant(value) or query.constant(graph, value).numel() != 1:
        return None
    return float(query.constant(graph, value))


def _spread(node: Any) -> Any:
    """Return what a length is a view of: an axis more, repeated along it."""
    while query.is_call(node, ops.EXPAND, ops.RESHAPE, ops.UNSQUEEZE):
        node = query.operand(node, 0)
    return node


def _over_one_axis(x: Any, axes: Any) -> _Length | None:
    if not isinstance(x, fx.Node) or not isinstance(axes, (list, tuple)) or len(axes) != 1:
        return None
    return _Length(x, int(axes[0]) % query.rank(x), 0.0)


def _root(node: Any) -> Any:
    """Return what ``node`` is the square of, or None."""
    is_square = query.is_call(node, ATEN.square.default) or _is_power(node, 2)
    is_product = query.is_call(node, ops.MUL) and node.args[0] is node.args[1]
    return node.args[0] if is_square or is_product else None


def _is_power(node: Any, exponent: float) -> bool:
    return query.is_call(node, ATEN.pow.Tensor_Scalar) and float(node.args[1]) == exponent


UNIT_LENGTH_RULES: Final[tuple[Rule[Any], ...]] = (UnitLengthIsRms(), CosineIsProduct())
