"""Puts blocks back to more bits until the score is where the user allows it; every trial is a real engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, Final

from torch import Tensor

from normfuse.bench.accuracy import Score
from normfuse.build import Engine
from normfuse.calibration import calibrate
from normfuse.feeding import Stream
from normfuse.graph.quantization import requests
from normfuse.planning import Plan
from normfuse.precision import chunk_size, chunked
from normfuse.precision.put_back import QuantizedBlock, output_error, put_back, quantized_blocks, widened
from normfuse.progress import Progress
from normfuse.quant.calibration_method import CalibrationMethod
from normfuse.quant.placement import Placement

__all__ = ["AccuracyControl", "Control", "Levels", "PutBack"]

RANKED_ON: Final = 32
"""Samples that blocks are ranked on: their effects differ by more than these would from others'."""

Levels = Mapping[str, Placement | None]
"""What blocks are put back to, by name, the cheapest first; None is float."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PutBack:
    """A block that got more bits: its layers, what it got, and how much of the outputs' relative error went with it."""

    layers: tuple[str, ...]
    level: str
    effect: float

    def __str__(self) -> str:
        return f"{', '.join(self.layers)} ({self.level})"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Trial:
    """An engine that was built, what it was put together from, and the points of the score that it loses."""

    plan: Plan
    backs: tuple[PutBack, ...]
    engine: Engine
    drop: float

    @property
    def last_level(self) -> str:
        """What was put back last, or nothing."""
        return self.backs[-1].level if self.backs else ""

    @property
    def at_last_level(self) -> int:
        """How many blocks were put back to it."""
        return sum(back.level == self.last_level for back in self.backs)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Control:
    """The trials in order, the one that was chosen, and the drop that was allowed.

    ``scores`` are what the drop was measured by: the baseline's and the chosen engine's, by label.
    """

    trials: tuple[Trial, ...]
    chosen: Trial
    allowed: float
    scores: Mapping[str, Score] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Return the control for JSON."""
        return {
            "allowed": self.allowed,
            "drop": self.chosen.drop,
            "holds": self.chosen.drop <= self.allowed,
            "put_back": [
                {"layers": list(back.layers), "level": back.level, "effect": back.effect} for back in self.chosen.backs
            ],
            "trials": [
                {
                    "put_back": len(trial.backs),
                    "level": trial.last_level,
                    "drop": trial.drop,
                }
                for trial in self.trials
            ],
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class AccuracyControl:
    """Gives blocks more bits until the drop is allowed (the idea is NNCF's; ranking and search are ours).

    Blocks are ranked by how much of the error of the network's outputs goes when one alone is put back. At the first
    level at which all of them together are enough, bisection finds the shortest part of the ranking that is: drops are
    taken to fall with every block, and what is chosen was measured. At the last level, float, all of them together
    would be the float network, so that one block always stays; where nothing is enough, the smallest drop is chosen.

    Attributes:
        levels: what blocks can be put back to.
        allowed: the largest drop, in points.
        build: writes the engine of a plan.
        drop_of: measures the points of the score that an engine loses.
        progress: shows the ranking.
        method: how ranges are chosen for activations that get more bits.
        untouched: names of linear maps and requests that keep their bits whatever is put back: the user gave them.
    """

    levels: Levels
    allowed: float
    build: Callable[[Plan], Engine]
    drop_of: Callable[[Engine], float]
    progress: Progress
    method: CalibrationMethod = CalibrationMethod.AUTO
    untouched: frozenset[str] = frozenset()

    def run(self, plan: Plan, samples: Stream) -> Control:
        """Return what was tried and chosen; blocks are ranked, and given new ranges, on ``samples``."""
        trials = [self._trial(plan, ())]
        if trials[0].drop > self.allowed:
            chunks = chunked(islice(samples(), RANKED_ON), chunk_size(plan.graph))
            for level, placement in self.levels.items():
                start = trials[-1] if placement is None else self._ranged(trials[-1], placement, samples)
                found = self._search(start, level, placement, chunks)
                trials += found
                if any(trial.drop <= self.allowed for trial in found):
                    break
        return Control(trials=tuple(trials), chosen=self._choose(trials), allowed=self.allowed)

    def _ranged(self, start: Trial, placement: Placement, samples: Stream) -> Trial:
        """Return the trial with ranges for what will have more bits; its own were clipped for few."""
        wide = widened(start.plan.graph, self._blocks(start.plan), placement)
        before = {request.node.name: request.type for request in requests(start.plan.graph)}
        if all(before[request.node.name] == request.type for request in requests(wide)):
            return start
        found = calibrate(wide, samples, method=self.method, progress=self.progress)
        ranges = {**start.plan.decided.ranges, **found.by_name}
        return replace(start, plan=start.plan.changed(replace(start.plan.decided, ranges=ranges)))

    def _blocks(self, plan: Plan) -> list[QuantizedBlock]:
        return quantized_blocks(plan.graph, untouched=self.untouched)

    def _choose(self, trials: Sequence[Trial]) -> Trial:
        enough = [trial for trial in trials if trial.drop <= self.allowed]
        if enough:
            return min(enough, key=lambda trial: trial.at_last_level)  # all are of one level
        return min(trials, key=lambda trial: trial.drop)

    def _search(
        self, start: Trial, level: str, placement: Placement | None, chunks: Sequence[Sequence[Tensor]]
    ) -> list[Trial]:
        """Return the trials of one level: all blocks at once first, then the bisection."""
        ranking = self._ranking(start.plan, placement, chunks)
        backs = [PutBack(layers=block.layers, level=level, effect=effect) for block, effect in ranking]
        most = len(ranking) - (placement is None)

        def trial(count: int) -> Trial:
            plan = start.plan
            for block, _ in ranking[:count]:
                plan = plan.changed(put_back(plan.decided, block, placement))
            wider = {back.layers for back in backs[:count]}
            before = tuple(back for back in start.backs if back.layers not in wider)
            return self._trial(plan, (*before, *backs[:count]))

        if most < 1:
            return []
        found = [trial(most)]
        low, high = 0, most if found[0].drop <= self.allowed else 0
        while high - low > 1:
            middle = (low + high) // 2
            found.append(trial(middle))
            low, high = (low, middle) if found[-1].drop <= self.allowed else (middle, high)
        return found

    def _trial(self, plan: Plan, backs: tuple[PutBack, ...]) -> Trial:
        engine = self.build(plan)
        return Trial(plan=plan, backs=backs, engine=engine, drop=self.drop_of(engine))

    def _ranking(
        self, plan: Plan, placement: Placement | None, chunks: Sequence[Sequence[Tensor]]
    ) -> list[tuple[QuantizedBlock, float]]:
        """Return the blocks with what putting one alone back mends, the most first."""
        blocks, found = self._blocks(plan), []
        targets = [plan.graph.run(*chunk) for chunk in chunks]
        before = output_error(plan.decided, chunks, targets)
        with self.progress.task("ranking blocks", len(blocks)) as advance:
            for block in blocks:
                after = output_error(put_back(plan.decided, block, placement), chunks, targets)
                found.append((block, before - after))
                advance(1)
        return sorted(found, key=lambda pair: -pair[1])
