"""Layer norm and RMS norm written out by hand become one operator."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx

from normfuse.graph import Graph, ops, query
from normfuse.graph.edit import Editor
from normfuse.pipeline import Fact, Pass
from normfuse.report import PassReport
from normfuse.rewrite import Match, Rule, apply_rules, call

__all__ = ["RecognizeNorms"]

ATEN = ops.ATEN


@dataclass(frozen=True, slots=True, kw_only=True)
class RecognizeNorms(Pass):
    """Write a normalization that the model spells out as layer_norm or rms_norm.

        before   d / sqrt(mean(d^2) + eps)  with d = x - mean(x)     or  (x - mean(x)) / sqrt(var(x) + eps)
        after    layer_norm(x; eps)

        before   x / sqrt(mean(x^2) + eps)
        after    rms_norm(x; eps)

    1. Quotients may be products with rsqrt or with the power -1/2; squares products, powers or `square`.
    2. The means are over the same single axis, kept; an axis that is not the last one is turned there and back. Its
       size is known: no norm over the samples.
    3. eps is a number; the variance is the biased one; the means are of the tensor's own type.

    gamma and beta stay behind as a product and a sum: they are affines. Exact in real arithmetic.
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
    roots = (ATEN.rsqrt.default,) if inverted else (ATEN.sqrt.default,)
    is_power = query.is_call(node, ATEN.pow.Tensor_Scalar) and node.args[1] == (-0.5 if inverted else 0.5)
    if not (query.is_call(node, *roots) or is_power):
        return None
    total = node.args[0]
    if not query.is_call(total, ops.ADD) or total.kwargs:
        return None
    pairs = [total.args[:2], total.args[1::-1]]
    return next(((moment, float(eps)) for moment, eps in pairs if isinstance(eps, (int, float))), None)


def _norm(numerator: Any, moment: fx.Node, eps: float) -> _Norm | None:
    mean_of = _centred(numerator)
    if query.is_call(moment, ATEN.var.correction, ATEN.var.dim) and mean_of is not None:
        x, axis = mean_of
        return _Norm(x, axis, eps, True) if _is_variance(moment, x, axis) else None
    found = _mean(moment)
    if found is None or not _same(_squared(found[0]), numerator):
        return None
    axis = found[1]
    if mean_of is not None and mean_of[1] == axis:
        return _Norm(mean_of[0], axis, eps, True)
    return _Norm(numerator, axis, eps, False)


def _is_variance(node: fx.Node, x: fx.Node, axis: int) -> bool:
    """Return whether ``node`` is the biased variance of x over the kept axis."""
    over = node.args[1] if len(node.args) > 1 else None
    if node.target is ATEN.var.dim:
        is_biased = not query.argument(node, 2, "unbiased", True) and query.argument(node, 3, "keepdim", False)
    else:
        is_biased = node.kwargs.get("correction", 1) == 0 and node.kwargs.get("keepdim", False)
    over_axis = isinstance(over, (list, tuple)) and [int(number) % query.rank(x) for number in over] == [axis]
    return bool(is_biased) and over_axis and node.args[0] is x


def _same(one: Any, other: Any) -> bool:
    """Return whether two nodes are one, or the same call of the same arguments (x - mean(x) is often written twice)."""
    if one is other:
        return True
    are_calls = isinstance(one, fx.Node) and isinstance(other, fx.Node) and one.op == other.op == "call_function"
    return are_calls and (one.target, one.args, one.kwargs) == (other.target, other.args, other.kwargs)


def _centred(node: Any) -> tuple[fx.Node, int] | None:
    """Return x and the axis if ``node`` is x - mean(x)."""
    if not query.is_call(node, ops.SUB) or node.kwargs or len(node.args) > 2:
        return None
    found = _mean(node.args[1])
    return found if found is not None and found[0] is node.args[0] else None


def _mean(node: Any) -> tuple[fx.Node, int] | None:
    """Return what a mean over one kept axis is taken of, and the axis."""
    if not query.is_call(node, ops.MEAN) or not query.argument(node, 2, "keepdim", False):
        return None
    over, source = query.argument(node, 1, "dim", ()), node.args[0]
    if over is None or len(over) != 1 or query.dtype(node) != query.dtype(source):
        return None
    axis = int(over[0]) % query.rank(source)
    return (source, axis) if isinstance(query.shape(source)[axis], int) else None


def _squared(node: Any) -> Any:
    """Return what ``node`` is the square of, or None."""
    if query.is_call(node, ATEN.square.default) or (
        query.is_call(node, ATEN.pow.Tensor_Scalar) and float(node.args[1]) == 2.0
    ):
        return node.args[0]
    return node.args[0] if query.is_call(node, ops.MUL) and node.args[0] is node.args[1] else None
