"""Times engines against each other: fresh processes, warm-up, rounds in rotating order."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Final

import numpy as np

from normfuse.bench.memory import measure_memory
from normfuse.bench.worker_process import EngineSpec, Load, WorkerProcess
from normfuse.errors import UsageError
from normfuse.progress import Progress, Silent

__all__ = ["EngineSpec", "Schedule", "Timing", "measure_memory", "time_engines", "turn_order"]

SETTLING_RUNS: Final = 1
"""Untimed runs at the start of a turn: the engine before this one has filled the caches."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """How long to measure: turns per engine, and about how long each is, within limits on its runs.

    ``start_seconds`` and ``turn_seconds_at_most`` are the longest that an engine may take to open, and to answer.
    """

    rounds: int = 7
    seconds_per_round: float = 0.4
    warm_up_runs: int = 3
    min_runs: int = 3
    max_runs: int = 200
    start_seconds: float = 180.0
    turn_seconds_at_most: float = 300.0

    def runs_per_turn(self, milliseconds: float) -> int:
        """Return how many runs of that length fill a turn."""
        wanted = math.ceil(1e3 * self.seconds_per_round / max(milliseconds, 1e-3))
        return max(self.min_runs, min(self.max_runs, wanted))


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Milliseconds per run over all rounds, and samples per second at the median.

    ``rounds`` are the medians of the rounds, in order: the same round of two engines ran under the same
    conditions, so ratios are taken round by round. ``inputs`` are the shapes that were run.
    """

    p50: float
    p90: float
    p99: float
    throughput: float
    runs: int
    rounds: tuple[float, ...]
    inputs: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def spread(self) -> float:
        """How far the rounds' medians lie apart, relative to the median: the noise of the machine."""
        return (max(self.rounds) - min(self.rounds)) / self.p50

    @classmethod
    def of(
        cls, rounds: Sequence[Sequence[float]], *, batch: int, inputs: Mapping[str, tuple[int, ...]] | None = None
    ) -> Timing:
        """Return the timing of milliseconds by round (percentiles by linear interpolation, over all runs)."""
        values = np.concatenate([np.asarray(found, dtype=np.float64) for found in rounds])
        p50, p90, p99 = (float(np.percentile(values, share)) for share in (50, 90, 99))
        medians = tuple(median(found) for found in rounds)
        return cls(
            p50=p50,
            p90=p90,
            p99=p99,
            throughput=1e3 * batch / p50,
            runs=len(values),
            rounds=medians,
            inputs=inputs or {},
        )

    def as_dict(self) -> dict[str, object]:
        """Return the timing for JSON."""
        return {
            "p50_ms": self.p50,
            "p90_ms": self.p90,
            "p99_ms": self.p99,
            "samples_per_second": self.throughput,
            "runs": self.runs,
            "round_medians_ms": list(self.rounds),
            "spread": self.spread,
            "inputs": {name: list(sizes) for name, sizes in self.inputs.items()},
        }


def time_engines(
    engines: Sequence[EngineSpec],
    *,
    batch: int,
    threads: int,
    inputs: Path | None = None,
    schedule: Schedule | None = None,
    progress: Progress | None = None,
) -> dict[str, Timing]:
    """Return the timing of every engine, by label (ours).

    All processes are open at once and idle but one; each round gives every engine one turn, in an order that
    rotates, so that drift of the machine falls on all alike.

    Args:
        engines: labels must differ.
        batch: samples per run.
        threads: of every engine.
        inputs: an ``.npz`` with an array per input name; None takes the same seeded random arrays for all.
        schedule: how long.
        progress: shows starts and turns.

    Raises:
        CheckFailed: an engine crashed or did not answer in time; the message ends with what it wrote.
        UsageError: two engines have one label.
    """
    labels = [engine.label for engine in engines]
    if len(set(labels)) < len(labels):
        raise UsageError("two engines have the same label", where=", ".join(labels), expected="a label for each")
    shown, plan = progress or Silent(), schedule or Schedule()
    load = Load(batch=batch, threads=threads, inputs=inputs)
    with ExitStack() as stack, shown.task("measuring", len(engines) * (plan.rounds + 1)) as advance:
        workers: dict[str, WorkerProcess] = {}
        for engine in engines:
            worker = WorkerProcess(engine, load, start_seconds=plan.start_seconds)
            workers[engine.label] = stack.enter_context(worker)
            advance(1)
        runs = {label: _warm_up(worker, plan) for label, worker in workers.items()}
        times: dict[str, list[list[float]]] = {label: [] for label in labels}
        for label in turn_order(labels, plan.rounds):
            workers[label].warm_up(SETTLING_RUNS, seconds=plan.turn_seconds_at_most)
            times[label].append(workers[label].run(runs[label], seconds=plan.turn_seconds_at_most))
            advance(1)
        return {label: Timing.of(found, batch=batch, inputs=workers[label].shapes) for label, found in times.items()}


def turn_order(labels: Sequence[str], rounds: int) -> list[str]:
    """Return whose turn it is: in every round each once, beginning one later than in the round before."""
    shifts = [turn % max(len(labels), 1) for turn in range(rounds)]
    return [label for shift in shifts for label in (*labels[shift:], *labels[:shift])]


def _warm_up(worker: WorkerProcess, plan: Schedule) -> int:
    """Run until buffers and threads exist, and return how many runs fill a turn."""
    worker.warm_up(plan.warm_up_runs, seconds=plan.turn_seconds_at_most)
    return plan.runs_per_turn(median(worker.run(plan.warm_up_runs, seconds=plan.turn_seconds_at_most)))
