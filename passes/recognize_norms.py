"""Layer norm and RMS norm written out by hand become one operator."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Final

from torch import fx

from normfuse.graph import Graph, ops, query
from normfuse.graph.edit import Editor
from normfuse.pipeline import Fact, Pass
from normfuse.report import PassReport
from normfuse.rewrite import Match, Rule, apply_rules, call

__all__ = ["RecognizeNorms"]

ATEN = ops.ATEN

VARIANCES: Final = (ATEN.var.correction, ATEN.var.dim)
VARIANCES_AND_MEANS: Final = (ATEN.var_mean.correction, ATEN.var_mean.dim)

DEEPEST: Final = 4
"""Calls behind each other that are compared: x - mean(x), and the views that x is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RecognizeNorms(Pass):
    """Write a normalization that the model spells out as layer_norm or rms_norm.

        before   d / sqrt(mean(d^2) + eps)  with d = x - mean(x)     or  (x - mean(x)) / sqrt(var(x) + eps)
        after    layer_norm(x; eps)

        before   x / sqrt(mean(x^2) + eps)
        after    rms_norm(x; eps)

    1. Quotients may be products with rsqrt, with the power -1/2 or with one over the root; squares products, powers
       or `square`; variance and mean may come from `var_mean`. What is written twice may be computed twice.
    2. The means are over the same single axis, kept; an axis that is not the last one is turned there and back. Its
       size is known: no norm over the samples.
    3. eps is a number; the variance is the biased one; the means are of the tensor's own type.

    gamma and beta stay behind as a product and a sum: they are affines. Exact in real arithmetic. Not known: a sum over
    a width in place of a mean, mean(x^2) - mean(x)^2 as a variance, eps in a clamp or outside the root, a statistic of
    another type than what it divides.
    """

    name: ClassVar[str] = "recognize-norms"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.CANONICAL})

    def run(self, graph: Graph) -> PassReport:
        """Apply the rule wherever it holds."""
        return apply_rules(graph, [SpelledOutNorm()], name=self.name)


@dataclass(frozen=True, slots=True)
class _Norm:
    x: fx.Node
    axis: int
    eps: float
    is_centred: bool


class SpelledOutNorm(Rule[_Norm]):
    """A tensor over the root of its own second moment."""

    name: ClassVar[str] = "spelled-out-norm"
    pattern = call(ops.MUL, ops.DIV)

    def plan(self, graph: Graph, match: Match) -> _Norm | None:
        """Return what is normalized, over which axis, with which eps."""
        node = match.root
        if node.kwargs or not all(query.is_tensor(operand) for operand in node.args):
            return None
        pairs = [node.args[:2]] if node.target is ops.DIV else [node.args[:2], node.args[1::-1]]
        for numerator, denominator in pairs:
            under = _under_root(denominator, inverted=node.target is ops.MUL)
            if under is not None and (found := _norm(numerator, *under)) is not None:
                return found
        return None

    def rewrite(self, match: Match, plan: _Norm, edit: Editor) -> None:
        """Call the norm, over the last axis."""
        rank = query.rank(plan.x)
        turn = [axis for axis in range(rank) if axis != plan.axis] + [plan.axis]
        is_last = plan.axis == rank - 1
        x = plan.x if is_last else edit.call(ops.PERMUTE, plan.x, turn, at=match.root)
        width = query.shape(x)[-1]
        parameters: tuple[Any, ...] = (None, None, plan.eps) if plan.is_centred else (None, plan.eps)
        norm = edit.call(ops.LAYER_NORM if plan.is_centred else ops.RMS_NORM, x, [width], *parameters, at=match.root)
        if not is_last:
            norm = edit.call(ops.PERMUTE, norm, [turn.index(axis) for axis in range(rank)], at=match.root)
        edit.redirect(match.root, norm)


def _under_root(node: Any, *, inverted: bool) -> tuple[fx.Node, float] | None:
    """Return what the root is taken of, without eps, and eps."""
    if inverted and (root := _one_over(node)) is not None:
        return _under_root(root, inverted=False)
    roots = (ATEN.rsqrt.default,) if inverted else (ATEN.sqrt.default,)
    is_power = query.is_call(node, ATEN.pow.Tensor_Scalar) and node.args[1] == (-0.5 if inverted else 0.5)
    if not (query.is_call(node, *roots) or is_power):
        return None
    total = node.args[0]
    if not query.is_call(total, ops.ADD) or total.kwargs:
        return None
    pairs = [total.args[:2], total.args[1::-1]]
    return next(((moment, float(eps)) for moment, eps in pairs if isinstance(eps, (int, float))), None)


def _one_over(node: Any) -> Any:
    """Return what ``node`` is one over (1 / x is a reciprocal, times one), or None."""
    if query.is_call(node, ops.MUL) and node.args[1] == 1:
        node = node.args[0]
    return node.args[0] if query.is_call(node, ATEN.reciprocal.default) else None


def _norm(numerator: Any, moment: fx.Node, eps: float) -> _Norm | None:
    mean_of, variance_of = _centred(numerator), _variance(moment)
    if variance_of is not None:
        is_own = mean_of is not None and mean_of[1] == variance_of[1] and _same(mean_of[0], variance_of[0])
        return _Norm(*variance_of, eps, True) if is_own else None
    found = _mean(moment)
    if found is None or not _same(_squared(found[0]), numerator):
        return None
    axis = found[1]
    if mean_of is not None and mean_of[1] == axis:
        return _Norm(mean_of[0], axis, eps, True)
    return _Norm(numerator, axis, eps, False)


def _same(one: Any, other: Any, deepest: int = DEEPEST) -> bool:
    """Return whether two nodes are one, or the same call of the same arguments (x - mean(x) is often written twice)."""
    if one is other:
        return True
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(_same(*pair, deepest) for pair in zip(one, other, strict=True))
    if not isinstance(one, fx.Node) or not isinstance(other, fx.Node):
        return bool(one == other)
    are_calls = one.op == other.op == "call_function" and (one.target, one.kwargs) == (other.target, other.kwargs)
    return are_calls and deepest > 0 and _same(one.args, other.args, deepest - 1)


def _centred(node: Any) -> tuple[fx.Node, int] | None:
    """Return x and the axis if ``node`` is x - mean(x)."""
    if not query.is_call(node, ops.SUB) or node.kwargs or len(node.args) > 2:
        return None
    found = _mean(node.args[1])
    return found if found is not None and _same(found[0], node.args[0]) else None


def _mean(node: Any) -> tuple[fx.Node, int] | None:
    """Return what a mean over one kept axis is taken of, and the axis."""
    if (both := _part(node, 1)) is not None:
        return _over_one_axis(both, keeps=query.argument(both, 3, "keepdim", False))
    if not query.is_call(node, ops.MEAN):
        return None
    found = _over_one_axis(node, keeps=query.argument(node, 2, "keepdim", False))
    return found if found is not None and query.dtype(node) == query.dtype(found[0]) else None


def _variance(node: Any) -> tuple[fx.Node, int] | None:
    """Return what a biased variance over one kept axis is taken of, and the axis."""
    call = _part(node, 0) or node
    if not query.is_call(call, *VARIANCES, *VARIANCES_AND_MEANS):
        return None
    by_word = call.target in (ATEN.var.dim, ATEN.var_mean.dim)
    is_biased = not query.argument(call, 2, "unbiased", True) if by_word else call.kwargs.get("correction", 1) == 0
    return _over_one_axis(call, keeps=query.argument(call, 3, "keepdim", False)) if is_biased else None


def _part(node: Any, index: int) -> fx.Node | None:
    """Return the call that gives variance and mean if ``node`` is that one of the two."""
    is_part = query.is_call(node, ops.GETITEM) and query.is_call(node.args[0], *VARIANCES_AND_MEANS)
    return node.args[0] if is_part and node.args[1] == index else None


def _over_one_axis(call: fx.Node, *, keeps: bool) -> tuple[fx.Node, int] | None:
    over, source = query.argument(call, 1, "dim", ()), call.args[0]
    if not keeps or over is None or len(over) != 1:
        return None
    assert isinstance(source, fx.Node)
    axis = int(over[0]) % query.rank(source)
    return (source, axis) if isinstance(query.shape(source)[axis], int) else None


def _squared(node: Any) -> Any:
    """Return what ``node`` is the square of, or None."""
    if query.is_call(node, ATEN.square.default) or (
        query.is_call(node, ATEN.pow.Tensor_Scalar) and float(node.args[1]) == 2.0
    ):
        return node.args[0]
    return node.args[0] if query.is_call(node, ops.MUL) and _same(*node.args[:2]) else None
