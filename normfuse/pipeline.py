"""``Pass``, ``Phase`` and ``Pipeline``: declared order, verified after each pass, located failures."""

from __future__ import annotations

import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum, auto
from typing import ClassVar

from normfuse.errors import InternalError, NormfuseError, UsageError
from normfuse.graph import Graph, verify
from normfuse.report import PassReport

__all__ = ["Fact", "Pass", "Phase", "Pipeline"]

log = logging.getLogger(__name__)


class Fact(Enum):
    """What one pass leaves true and another needs."""

    CANONICAL = auto()
    AFFINES = auto()
    FOLDED = auto()
    PLACED = auto()
    QUANTIZED = auto()


class Pass(ABC):
    """A frozen dataclass with a kebab-case name; its fields are its options."""

    name: ClassVar[str]
    requires: ClassVar[frozenset[Fact]] = frozenset()
    provides: ClassVar[frozenset[Fact]] = frozenset()

    @abstractmethod
    def run(self, graph: Graph) -> PassReport:
        """Change ``graph`` in place and report what was done and what was refused."""


@dataclass(frozen=True, slots=True)
class Phase:
    """A named group of passes that run in order."""

    name: str
    passes: tuple[Pass, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pipeline:
    """Phases in order. ``given`` holds at the start; ``dump`` gets each pass's name and the graph's text behind it."""

    phases: tuple[Phase, ...]
    given: frozenset[Fact] = frozenset()
    stop_after: str = ""
    dump: Callable[[str, str], None] | None = field(default=None, compare=False)

    def check(self) -> None:
        """Refuse a wrong order before anything runs.

        Raises:
            UsageError: a pass needs a fact that no earlier pass provides, or ``stop_after`` is unknown.
        """
        known: dict[Fact, str] = dict.fromkeys(self.given, "the start")
        for step in self._steps():
            if missing := step.requires - known.keys():
                later = [other.name for other in self._steps() if other.provides & missing]
                raise UsageError(
                    f"pass {step.name} stands too early",
                    expected=f"{', '.join(sorted(fact.name for fact in missing))} before it",
                    hint=f"move {' or '.join(later)} before it" if later else "add the pass that provides it",
                )
            known.update(dict.fromkeys(step.provides, step.name))
        names = [step.name for step in self._steps()]
        if self.stop_after and self.stop_after not in names:
            raise UsageError(f"no pass is called {self.stop_after}", expected=f"one of {', '.join(names)}")

    def run(self, graph: Graph, *, progress: Callable[[str], None] = lambda name: None) -> list[PassReport]:
        """Run all passes on ``graph`` and return one report per pass.

        Raises:
            InternalError: a pass failed or left the graph broken; the message names pass and phase and
                carries the last good graph as ``graph_text``.
        """
        self.check()
        reports: list[PassReport] = []
        for phase in self.phases:
            for step in phase.passes:
                progress(step.name)
                reports.append(self._run_one(step, phase, graph, done=reports))
                if step.name == self.stop_after:
                    return reports
        return reports

    def bisect(self, graph: Graph, is_good: Callable[[Graph], bool]) -> str | None:
        """Return the name of the first pass after which ``is_good`` no longer holds, or None."""
        trial = graph.copy()
        for step in self._steps():
            step.run(trial)
            if not is_good(trial):
                return step.name
        return None

    def _steps(self) -> Iterator[Pass]:
        return (step for phase in self.phases for step in phase.passes)

    def _run_one(self, step: Pass, phase: Phase, graph: Graph, *, done: Sequence[PassReport]) -> PassReport:
        before = graph.text()
        started = time.perf_counter()
        try:
            report = step.run(graph)
            verify(graph)
        except NormfuseError as error:
            if not isinstance(error, InternalError):
                raise
            raise _located(error, step, phase, done, before) from error
        except Exception as error:
            raise _located(error, step, phase, done, before) from error
        log.info("%s: %s, %d left", step.name, dict(report.applied), len(report.refused))
        if self.dump is not None:
            self.dump(step.name, graph.text())
        return replace(report, seconds=time.perf_counter() - started)


def _located(error: Exception, step: Pass, phase: Phase, done: Sequence[PassReport], before: str) -> InternalError:
    place = f"pass {step.name}, phase {phase.name}, after {', '.join(report.name for report in done) or 'nothing'}"
    detail = getattr(error, "where", "")
    located = InternalError(f"a pass failed: {error}", where=f"{place}{'; ' if detail else ''}{detail}")
    located.__dict__["graph_text"] = before
    return located
