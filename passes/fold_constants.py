"""Computes once what depends on constants only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Final

import torch
from torch import Tensor, fx

from normfuse.graph import Graph, ops, query
from normfuse.graph.edit import Editor
from normfuse.pipeline import Pass
from normfuse.report import PassReport
from normfuse.rewrite import Match, Rule, apply_rules, call

__all__ = ["FoldConstants"]

SMALL: Final = 4096
"""Elements that any constant may have: smaller than the nodes that would compute it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FoldConstants(Pass):
    """Replace every call whose tensor arguments are all constants (or that has none: arange, full) by its value.

    1. The operator has no randomness and no side effect,
    2. its value is one tensor,
    3. the value is no more than ``largest_growth`` times as large as its arguments (an expanded constant
       would make the file bigger and nothing faster).

    Exact: the same operator runs, once.
    """

    name: ClassVar[str] = "fold-constants"
    largest_growth: int = 4

    def run(self, graph: Graph) -> PassReport:
        """Apply the rule to a fixpoint."""
        return apply_rules(graph, [ComputeConstant(self.largest_growth)], name=self.name)


class ComputeConstant(Rule[Tensor]):
    """Compute a call of constants."""

    name: ClassVar[str] = "compute-constant"
    pattern = call()

    def __init__(self, largest_growth: int) -> None:
        self._largest_growth = largest_growth

    def plan(self, graph: Graph, match: Match) -> Tensor | None:
        """Return the value."""
        node = match.root
        sources = node.all_input_nodes
        if node.op != "call_function" or not all(query.is_constant(source) for source in sources):
            return None
        if not isinstance(node.target, torch._ops.OpOverload) or _is_random(node.target):
            return None
        size = sum(query.constant(graph, source).numel() for source in sources)
        if not query.is_tensor(node) or node.meta["val"].numel() > max(self._largest_growth * size, SMALL):
            return None

        def data(argument: fx.Node) -> Tensor:
            return query.constant(graph, argument)

        with torch.no_grad():
            value: Tensor = node.target(*fx.map_arg(node.args, data), **fx.map_arg(node.kwargs, data))
        return value.clone()

    def rewrite(self, match: Match, plan: Tensor, edit: Editor) -> None:
        """Put the constant in the call's place."""
        edit.redirect(match.root, edit.constant(plan, match.root.name, like=match.root))


def _is_random(target: torch._ops.OpOverload) -> bool:
    """Return whether an operator draws numbers; dropout does not in eval mode (docs/invariants.md)."""
    return target is not ops.DROPOUT and torch.Tag.nondeterministic_seeded in target.tags
