"""Writes the affines that no fold took as ordinary operators."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from normfuse.graph import Graph, ops, query
from normfuse.graph.affine import AFFINE, Affine, along, read_affine
from normfuse.graph.edit import Editor
from normfuse.pipeline import Fact, Pass
from normfuse.report import PassReport
from normfuse.rewrite import Match, Rule, apply_rules, call

__all__ = ["LowerAffines"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LowerAffines(Pass):
    """Write every affine left as a norm's gamma and beta, or as a product and a sum.

    1. Behind a norm without gamma and beta that nobody else reads, the norm takes them back.
    2. Elsewhere a product, a sum, or both; a scale of one and a shift of zero are left out.
    """

    name: ClassVar[str] = "lower-affines"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.AFFINES})

    def run(self, graph: Graph) -> PassReport:
        """Leave no affine behind."""
        rules: list[Rule[Any]] = [AffineIntoNorm(), AffineIsArithmetic()]
        return apply_rules(graph, rules, name=self.name)


class AffineIntoNorm(Rule[Affine]):
    """gamma * norm(x) + beta = norm(x; gamma, beta) (1)."""

    name: ClassVar[str] = "affine-into-norm"
    pattern = call(AFFINE, args=(call(*ops.ONLINE_NORMS, as_="norm"),))

    def plan(self, graph: Graph, match: Match) -> Affine | None:
        """Return the affine if the norm can take it."""
        norm, found = match["norm"], read_affine(graph, match.root)
        positions = ops.ONLINE_NORMS[norm.target]
        is_bare = all(len(norm.args) <= index or norm.args[index] is None for index in positions)
        axis = query.rank(norm) - 1 if norm.target in (ops.LAYER_NORM, ops.RMS_NORM) else 1
        is_along = not found.is_uniform and found.axis == axis
        if norm.target in (ops.LAYER_NORM, ops.RMS_NORM):
            is_along = is_along and len(norm.args[1]) == 1  # type: ignore[arg-type]
        has_place = len(positions) > 1 or not bool(found.shift.any())
        return found if is_bare and is_along and has_place and query.only_reader(norm) is not None else None

    def rewrite(self, match: Match, plan: Affine, edit: Editor) -> None:
        """Join the two."""
        norm, dtype = match["norm"], query.dtype(match.root)
        label = query.layer_of(match.root) or match.root.name
        joined = edit.replace(match.root, norm.target, *norm.args, **norm.kwargs)  # type: ignore[arg-type]
        for index, vector, name in zip(
            ops.ONLINE_NORMS[norm.target], (plan.scale, plan.shift), ("weight", "bias"), strict=False
        ):
            edit.set_argument(joined, index, edit.constant(vector.to(dtype), f"{label}.{name}", like=norm))


class AffineIsArithmetic(Rule[Affine]):
    """scale * x + shift (2)."""

    name: ClassVar[str] = "affine-is-arithmetic"
    pattern = call(AFFINE)

    def plan(self, graph: Graph, match: Match) -> Affine:
        """Return the constants."""
        return read_affine(graph, match.root)

    def rewrite(self, match: Match, plan: Affine, edit: Editor) -> None:
        """Write a product and a sum, without what changes nothing."""
        node = match.root
        current, label = node.args[0], query.layer_of(node) or node.name
        steps = [(ops.MUL, plan.scale, 1.0, "scale"), (ops.ADD, plan.shift, 0.0, "shift")]
        for target, vector, neutral, name in steps:
            if bool(torch.all(vector == neutral)):
                continue
            data = along(vector.to(query.dtype(node)), plan.axis, query.rank(node))
            current = edit.call(target, current, edit.constant(data, f"{label}.{name}", like=node), at=node)
        edit.redirect(node, current)  # type: ignore[arg-type]
