"""The rule that computes what depends on constants only, however large it becomes."""

from __future__ import annotations

from typing import Any, ClassVar, Final

import torch
from torch import Tensor, fx

from normfuse.graph import Graph, ops, query
from normfuse.graph.edit import Editor
from normfuse.rewrite.pattern import Match, call
from normfuse.rewrite.rule import Rule

__all__ = ["COMPUTED_CONSTANT_RULES"]

KEPT: Final = (ops.EXPAND, ops.REPEAT, ops.ADD)
"""Repetitions and sums of constants (a bias of scores): codes are repeated and added as well, and take less space."""


class ConstantIsComputed(Rule[Tensor]):
    """A function of constants is a constant, where it would otherwise have to be computed in integers."""

    name: ClassVar[str] = "constant-is-computed"
    pattern = call()

    def plan(self, graph: Graph, match: Match) -> Tensor | None:
        """Return the value, or one of several."""
        node = match.root
        made = node.args[0] if query.is_call(node, ops.GETITEM) else node
        if not isinstance(made, fx.Node) or made.op != "call_function" or not query.is_tensor(node):
            return None
        is_kept = made.target in KEPT and query.is_float(made)
        if is_kept or not isinstance(made.target, torch._ops.OpOverload):
            return None
        draws = torch.Tag.nondeterministic_seeded in made.target.tags
        if draws or not made.all_input_nodes or not all(map(query.is_constant, made.all_input_nodes)):
            return None

        def data(argument: fx.Node) -> Tensor:
            return query.constant(graph, argument)

        with torch.no_grad():
            value: Any = made.target(*fx.map_arg(made.args, data), **fx.map_arg(made.kwargs, data))
        return (value if made is node else value[node.args[1]]).clone()  # type: ignore[no-any-return]

    def rewrite(self, match: Match, plan: Tensor, edit: Editor) -> None:
        """Put the constant in the call's place."""
        edit.redirect(match.root, edit.constant(plan, match.root.name, like=match.root))


COMPUTED_CONSTANT_RULES: Final[tuple[Rule[Any], ...]] = (ConstantIsComputed(),)
