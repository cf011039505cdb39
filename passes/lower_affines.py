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
    """Write every affine left as layer norm's gamma and beta, or as a product and a sum.

    1. Behind a layer norm without gamma and beta that nobody else reads, the norm takes them back.
    2. Elsewhere a product, a sum, or both; a scale of one and a shift of zero are left out.
    """

    name: ClassVar[str] = "lower-affines"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.AFFINES})

    def run(self, graph: Graph) -> PassReport:
        """Leave no affine behind."""
        rules: list[Rule[Any]] = [AffineIntoLayerNorm(), AffineIsArithmetic()]
        return apply_rules(graph, rules, name=self.name)


class AffineIntoLayerNorm(Rule[Affine]):
    """gamma * layer_norm(x) + beta = layer_norm(x; gamma, beta) (1)."""

    name: ClassVar[str] = "affine-into-layer-norm"
    pattern = call(AFFINE, args=(call(ops.LAYER_NORM, as_="norm"),))

    def plan(self, graph: Graph, match: Match) -> Affine | None:
        """Return the affine if the norm can take it."""
        norm, found = match["norm"], read_affine(graph, match.root)
        is_bare = query.argument(norm, 2, "weight") is None and query.argument(norm, 3, "bias") is None
        over_last = len(norm.args[1]) == 1 and found.axis == query.rank(norm) - 1  # type: ignore[arg-type]
        takes = is_bare and over_last and not found.is_uniform and query.only_reader(norm) is not None
        return found if takes else None

    def rewrite(self, match: Match, plan: Affine, edit: Editor) -> None:
        """Join the two."""
        norm, dtype = match["norm"], query.dtype(match.root)
        label = query.layer_of(match.root) or match.root.name
        gamma = edit.constant(plan.scale.to(dtype), f"{label}.weight", like=norm)
        beta = edit.constant(plan.shift.to(dtype), f"{label}.bias", like=norm)
        eps = query.argument(norm, 4, "eps", 1e-5)
        edit.replace(match.root, ops.LAYER_NORM, norm.args[0], norm.args[1], gamma, beta, eps)


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
