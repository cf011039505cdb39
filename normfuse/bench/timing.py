"""Times engines against each other: fresh processes, warm-up, rounds in rotating order."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Final

import numpy as np

from normfuse.bench.memory import measure_memory
from normfuse.bench.worker_process import EngineSpec, Load, WorkerProcess
from normfuse.errors import UsageError
from normfuse.progress import Advance, Progress, Silent

__all__ = ["EngineSpec", "Schedule", "Timing", "measure_memory", "time_engines", "turn_order"]

SETTLING_RUNS: Final = 1
"""Untimed runs at the start of a turn: the engine before this one has filled the caches."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """How long to measure: turns per engine, and how long each is, within limits on its runs.

    Turns are equally long in time, not in runs: on a busy machine the scheduler favours who runs shortly, and the
    same engine with fewer runs would seem faster. Where ``is_enough`` says no after ``rounds``, the engines are
    measured on up to ``most_rounds``. ``start_timeout`` and ``turn_timeout`` are the longest, in seconds, that an
    engine may take to open, and to answer.
    """

    rounds: int = 7
    most_rounds: int = 28
    is_enough: Callable[[Mapping[str, Timing]], bool] = lambda timings: True
    seconds_per_round: float = 0.4
    warm_up_runs: int = 5
    min_runs: int = 3
    max_runs: int = 10_000
    start_timeout: float = 180.0
    turn_timeout: float = 300.0


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
    with ExitStack() as stack:
        times: dict[str, list[list[float]]] = {label: [] for label in labels}
        with shown.task("measuring", len(engines) * (plan.rounds + 1)) as advance:
            workers = _start(engines, load, plan, stack, advance)
            _run(workers, turn_order(labels, plan.rounds), times, plan, advance)
        more = turn_order(labels, plan.most_rounds)[len(labels) * plan.rounds :]
        if more and not plan.is_enough(_timings(times, workers, batch)):
            with shown.task("too close: measuring on", len(more)) as advance:
                _run(workers, more, times, plan, advance)
        return _timings(times, workers, batch)


def turn_order(labels: Sequence[str], rounds: int) -> list[str]:
    """Return whose turn it is: in every round each once, beginning one later than in the round before."""
    shifts = [turn % max(len(labels), 1) for turn in range(rounds)]
    return [label for shift in shifts for label in (*labels[shift:], *labels[:shift])]


def _start(
    engines: Sequence[EngineSpec], load: Load, plan: Schedule, stack: ExitStack, advance: Advance
) -> dict[str, WorkerProcess]:
    workers: dict[str, WorkerProcess] = {}
    for engine in engines:
        worker = WorkerProcess(engine, load, start_seconds=plan.start_timeout)
        workers[engine.label] = stack.enter_context(worker)
        advance(1)
    for worker in workers.values():
        worker.warm_up(plan.warm_up_runs, timeout=plan.turn_timeout)
    return workers


def _run(
    workers: Mapping[str, WorkerProcess],
    turns: Sequence[str],
    times: Mapping[str, list[list[float]]],
    plan: Schedule,
    advance: Advance,
) -> None:
    for label in turns:
        times[label].append(_turn(workers[label], plan))
        advance(1)


def _timings(
    times: Mapping[str, list[list[float]]], workers: Mapping[str, WorkerProcess], batch: int
) -> dict[str, Timing]:
    return {label: Timing.of(found, batch=batch, inputs=workers[label].shapes) for label, found in times.items()}


def _turn(worker: WorkerProcess, plan: Schedule) -> list[float]:
    worker.warm_up(SETTLING_RUNS, timeout=plan.turn_timeout)
    return worker.run(plan.min_runs, lasting=plan.seconds_per_round, most=plan.max_runs, timeout=plan.turn_timeout)
