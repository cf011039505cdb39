"""Finds every per-channel affine by what the graph computes and writes it as one ``normfuse::affine``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from normfuse.graph import Graph, ops, query
from normfuse.graph.affine import AFFINE, IDENTITY, Affine, read_affine, write_affine
from normfuse.graph.edit import Editor
from normfuse.pipeline import Fact, Pass
from normfuse.report import PassReport
from normfuse.rewrite import Match, Rule, anything, apply_rules, call, constant
from normfuse.rewrite.commuting import backward
from normfuse.rewrite.norms import NORM_RULES
from normfuse.rewrite.views import VIEW_RULES

__all__ = ["FindAffines"]


@dataclass(frozen=True, slots=True, kw_only=True)
class FindAffines(Pass):
    """Write every constant per-channel affine as one node, as near to its producer as it can stand.

    Found: batch norm in eval mode, instance norm with kept statistics; products, quotients, sums and differences with
    a constant that varies along one axis at most; gamma and beta of layer, RMS, group and instance norm. Then:
    1. an affine of an affine is one affine,
    2. the sum of two affines of the same tensor (x itself among them) is one affine: RepBN's BN(x) + eta x,
    3. an affine behind a permute or reshape with no other reader moves in front of it,
    4. a uniform scale behind a product of two variables (attention's 1 / sqrt(d)) moves to the left one,
    5. what is added as 0 x + 0 goes, and what only it read with it: 0 * LN(x) + RepBN(x) at the end of a progression
       (a branch that gave an infinity or no number gives none any more).
    Left alone: what changes the tensor's type, and constants that this type cannot hold (float16 ends at 65504).

    Exact in real arithmetic; the constants are float64 (ours).
    """

    name: ClassVar[str] = "find-affines"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.CANONICAL})
    provides: ClassVar[frozenset[Fact]] = frozenset({Fact.AFFINES})

    def run(self, graph: Graph) -> PassReport:
        """Apply the rules to a fixpoint."""
        rules: list[Rule[Any]] = [
            *NORM_RULES,
            ScaleIsAffine(),
            ShiftIsAffine(),
            AffineOfAffine(),
            SumOfAffines(),
            ZeroIsNotAdded(),
            AffineBeforeView(),
            ScaleBeforeProduct(),
            *VIEW_RULES,  # views meet once the affine between them has moved
        ]
        return apply_rules(graph, rules, name=self.name)


def _vector_along_one_axis(graph: Graph, value: object, x: fx.Node) -> tuple[Tensor, int] | None:
    """Return a constant operand as a vector and the axis of ``x`` that it varies along."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return torch.tensor([float(value)], dtype=torch.float64), 0
    if not query.is_constant(value) or not isinstance(value, fx.Node):
        return None
    tensor = query.constant(graph, value)
    varying = [axis for axis, size in enumerate(tensor.shape) if size != 1]
    if not tensor.is_floating_point() or tensor.ndim > query.rank(x) or len(varying) > 1:
        return None
    axis = query.rank(x) - tensor.ndim + varying[0] if varying else 0
    # A constant that broadcasts x itself to a larger shape is no affine of x.
    if varying and query.shape(x)[axis] != tensor.numel():
        return None
    return tensor.double().reshape(-1), axis


def _is_floating_variable(node: object) -> bool:
    return (
        query.is_tensor(node)
        and isinstance(node, fx.Node)
        and not query.is_constant(node)
        and query.dtype(node).is_floating_point
    )


@dataclass(frozen=True, slots=True)
class _Operand:
    x: fx.Node
    affine: Affine


def _of_one_type(node: fx.Node, found: _Operand) -> _Operand | None:
    # A product with float64 makes float32 wider, and one over a large float16 rounds to zero: both are left alone.
    dtype = query.dtype(found.x)
    return found if query.dtype(node) == dtype and found.affine.fits(dtype) else None


class ScaleIsAffine(Rule[_Operand]):
    """A product with, or a quotient by, a constant."""

    name: ClassVar[str] = "scale-is-affine"
    pattern = call(ops.MUL, ops.DIV, ops.NEG)

    def plan(self, graph: Graph, match: Match) -> _Operand | None:
        """Return the variable operand and its scale."""
        node = match.root
        if node.target is ops.NEG:
            if not _is_floating_variable(node.args[0]):
                return None
            return _Operand(node.args[0], Affine(-IDENTITY.scale, IDENTITY.shift, 0))  # type: ignore[arg-type]
        x, other = node.args[:2]
        if not _is_floating_variable(x) and node.target is ops.MUL:
            x, other = other, x
        if node.kwargs or not _is_floating_variable(x):
            return None
        if (vector := _vector_along_one_axis(graph, other, x)) is None:  # type: ignore[arg-type]
            return None
        scale, axis = vector
        scale = scale if node.target is ops.MUL else scale.reciprocal()
        return _of_one_type(node, _Operand(x, Affine(scale, IDENTITY.shift, axis).spread()))  # type: ignore[arg-type]

    def rewrite(self, match: Match, plan: _Operand, edit: Editor) -> None:
        """Replace the product."""
        write_affine(edit, match.root, plan.x, plan.affine)


class ShiftIsAffine(Rule[_Operand]):
    """A sum or difference with a constant."""

    name: ClassVar[str] = "shift-is-affine"
    pattern = call(ops.ADD, ops.SUB, ops.RSUB)

    def plan(self, graph: Graph, match: Match) -> _Operand | None:
        """Return the variable operand, its sign and its shift."""
        node = match.root
        x, other = node.args[:2]
        if node.kwargs or len(node.args) > 2:  # alpha is given: rare, left alone
            return None
        negate_x = node.target is ops.RSUB
        if not _is_floating_variable(x):
            x, other, negate_x = other, x, node.target is ops.SUB
        if not _is_floating_variable(x):
            return None
        if (vector := _vector_along_one_axis(graph, other, x)) is None:  # type: ignore[arg-type]
            return None
        shift, axis = vector
        if node.target is ops.SUB and not negate_x:
            shift = -shift
        scale = -IDENTITY.scale if negate_x else IDENTITY.scale
        return _of_one_type(node, _Operand(x, Affine(scale, shift, axis).spread()))  # type: ignore[arg-type]

    def rewrite(self, match: Match, plan: _Operand, edit: Editor) -> None:
        """Replace the sum."""
        write_affine(edit, match.root, plan.x, plan.affine)


class AffineOfAffine(Rule[Affine]):
    """Two affines in a row are one (1)."""

    name: ClassVar[str] = "affine-of-affine"
    pattern = call(AFFINE, args=(call(AFFINE, as_="inner"),))

    def plan(self, graph: Graph, match: Match) -> Affine | None:
        """Return the one affine; the inner one must have no other reader, or it would be computed twice."""
        if query.only_reader(match["inner"]) is None:
            return None
        total = read_affine(graph, match.root).after(read_affine(graph, match["inner"]))
        return total if total is not None and total.fits(query.dtype(match.root)) else None

    def rewrite(self, match: Match, plan: Affine, edit: Editor) -> None:
        """Replace the outer one."""
        write_affine(edit, match.root, match["inner"].args[0], plan)  # type: ignore[arg-type]


class SumOfAffines(Rule[_Operand]):
    """a1 x + c1 + a2 x + c2 = (a1 + a2) x + (c1 + c2) (2)."""

    name: ClassVar[str] = "sum-of-affines"
    pattern = call(ops.ADD, args=(anything("left"), anything("right")))

    def plan(self, graph: Graph, match: Match) -> _Operand | None:
        """Return the tensor that both sides are affines of, and their sum."""
        sides = [self._side(graph, match[name]) for name in ("left", "right")]
        if match.root.kwargs or sides[0] is None or sides[1] is None or sides[0].x is not sides[1].x:
            return None
        if not any(query.is_call(match[name], AFFINE) for name in ("left", "right")):
            return None
        total = sides[0].affine.plus(sides[1].affine)
        return None if total is None else _of_one_type(match.root, _Operand(sides[0].x, total))

    def _side(self, graph: Graph, node: object) -> _Operand | None:
        if not _is_floating_variable(node) or not isinstance(node, fx.Node):
            return None
        if query.is_call(node, AFFINE) and query.only_reader(node) is not None:
            return _Operand(node.args[0], read_affine(graph, node))  # type: ignore[arg-type]
        return _Operand(node, IDENTITY)

    def rewrite(self, match: Match, plan: _Operand, edit: Editor) -> None:
        """Replace the sum."""
        write_affine(edit, match.root, plan.x, plan.affine)


class ZeroIsNotAdded(Rule[fx.Node]):
    """(0 x + 0) + y = y (5)."""

    name: ClassVar[str] = "zero-is-not-added"
    pattern = call(ops.ADD, args=(anything("left"), anything("right")))

    def plan(self, graph: Graph, match: Match) -> fx.Node | None:
        """Return what the zero is added to; it must have the shape and type of the sum."""
        for zero, other in ((match["left"], match["right"]), (match["right"], match["left"])):
            if not query.is_call(zero, AFFINE) or not _is_floating_variable(other) or match.root.kwargs:
                continue
            affine = read_affine(graph, zero)
            is_zero = not bool(affine.scale.any()) and not bool(affine.shift.any())
            if is_zero and _alike(other, match.root):
                return other
        return None

    def rewrite(self, match: Match, plan: fx.Node, edit: Editor) -> None:
        """Let who reads the sum read what is left of it."""
        edit.redirect(match.root, plan)


def _alike(one: fx.Node, other: fx.Node) -> bool:
    return query.shape(one) == query.shape(other) and query.dtype(one) == query.dtype(other)


class AffineBeforeView(Rule[Affine]):
    """affine(view(x)) = view(affine(x)) where the view has no other reader (3)."""

    name: ClassVar[str] = "affine-before-view"
    pattern = call(AFFINE, args=(call(*ops.VIEWS, as_="view"), constant("scale"), constant("shift")))

    def plan(self, graph: Graph, match: Match) -> Affine | None:
        """Return the affine along the axis that the channels have before the view."""
        found = read_affine(graph, match.root)
        if query.only_reader(match["view"]) is None:
            return None
        moved = backward(graph, match["view"], found)
        return moved if isinstance(moved, Affine) and moved.scale.numel() == found.scale.numel() else None

    def rewrite(self, match: Match, plan: Affine, edit: Editor) -> None:
        """Put a new affine in front of the view and let the view read it."""
        view = match["view"]
        source = view.args[0]
        moved = edit.call(AFFINE, source, match["scale"], match["shift"], plan.axis, at=view, like=match.root)
        edit.set_argument(view, 0, moved)
        edit.redirect(match.root, view)


class ScaleBeforeProduct(Rule[Affine]):
    """s * (x y) = (s x) y where nobody else reads the product (4)."""

    name: ClassVar[str] = "scale-before-product"
    pattern = call(AFFINE, args=(call(ops.MATMUL, as_="product"), constant("scale"), constant("shift")))

    def plan(self, graph: Graph, match: Match) -> Affine | None:
        """Return the scale if it is uniform and alone."""
        found, product = read_affine(graph, match.root), match["product"]
        is_plain_scale = found.is_uniform and not bool(found.shift.any())
        if not is_plain_scale or query.only_reader(product) is None or not _is_floating_variable(product.args[0]):
            return None
        return found

    def rewrite(self, match: Match, plan: Affine, edit: Editor) -> None:
        """Scale the left operand; the product takes the affine's place."""
        product = match["product"]
        left = edit.call(AFFINE, product.args[0], match["scale"], match["shift"], 0, at=product, like=match.root)
        edit.set_argument(product, 0, left)
        edit.redirect(match.root, product)
