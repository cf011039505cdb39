"""``Rule``: pattern, pure plan, rewrite; nothing is kept between the three."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, Generic, TypeVar

from normfuse.graph.edit import Editor
from normfuse.graph.graph import Graph
from normfuse.report import Refusal
from normfuse.rewrite.pattern import Match, Pattern

__all__ = ["PlanT", "Rule"]

PlanT = TypeVar("PlanT")


class Rule(ABC, Generic[PlanT]):
    """Find (``pattern``), decide (``plan``), edit (``rewrite``)."""

    name: ClassVar[str]
    pattern: ClassVar[Pattern]

    @abstractmethod
    def plan(self, graph: Graph, match: Match) -> PlanT | Refusal | None:
        """Return what to do; a refusal with its reason; or None where the match is not this rule's matter."""

    @abstractmethod
    def rewrite(self, match: Match, plan: PlanT, edit: Editor) -> None:
        """Edit the graph as planned."""

    def describe(self, graph: Graph, match: Match, plan: PlanT) -> dict[str, str]:
        """Return what a report should say of this site, before it is rewritten (empty: nothing but the count)."""
        return {}
