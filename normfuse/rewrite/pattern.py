"""Patterns over graph nodes: a small tree of calls, constants and anything."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from normfuse.graph import query

__all__ = ["Match", "Pattern", "anything", "call", "constant"]


@dataclass(frozen=True, slots=True)
class Match:
    """The nodes that a pattern found: its root and what its names are bound to."""

    root: fx.Node
    bound: Mapping[str, Any]

    def __getitem__(self, name: str) -> fx.Node:
        return self.bound[name]  # type: ignore[no-any-return]


@dataclass(frozen=True, slots=True)
class Pattern:
    """A call of one of ``targets`` (none: any node), with patterns for its first arguments."""

    targets: frozenset[Any] = frozenset()
    arguments: tuple[Pattern, ...] = ()
    name: str = ""
    must_be_constant: bool = False
    commutes: bool = field(default=False, kw_only=True)

    def match(self, node: object) -> Match | None:
        """Return the match with ``node`` as its root, or None."""
        bound: dict[str, Any] = {}
        if isinstance(node, fx.Node) and self._bind(node, bound):
            return Match(node, bound)
        return None

    def _bind(self, node: object, bound: dict[str, Any]) -> bool:
        if self.must_be_constant and not query.is_constant(node):
            return False
        if self.targets and not query.is_call(node, *self.targets):
            return False
        if self.name:
            # The same name twice means the same node twice.
            if self.name in bound and bound[self.name] is not node:
                return False
            bound[self.name] = node
        return not self.arguments or self._bind_arguments(node, bound)

    def _bind_arguments(self, node: object, bound: dict[str, Any]) -> bool:
        found = node.args[: len(self.arguments)] if isinstance(node, fx.Node) else ()
        orders = [found, found[::-1]] if self.commutes else [found]
        for order in orders:
            trial = dict(bound)
            if len(order) == len(self.arguments) and all(
                pattern._bind(argument, trial) for pattern, argument in zip(self.arguments, order, strict=True)
            ):
                bound.update(trial)
                return True
        return False


def call(*targets: Any, args: tuple[Pattern, ...] = (), as_: str = "", commutes: bool = False) -> Pattern:
    """Match a call of one of ``targets``; ``commutes`` tries the arguments in both orders."""
    return Pattern(frozenset(targets), args, as_, commutes=commutes)


def anything(as_: str) -> Pattern:
    """Match any argument."""
    return Pattern(name=as_)


def constant(as_: str) -> Pattern:
    """Match a constant tensor of the model."""
    return Pattern(name=as_, must_be_constant=True)
