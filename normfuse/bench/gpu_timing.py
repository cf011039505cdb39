"""How long inferences take on a device, in trtexec's terms: engines of one process in turns, by CUDA's own events."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from statistics import mean, median
from time import perf_counter

import numpy as np
import torch

__all__ = ["GpuSchedule", "Turn", "summary", "synchronize", "take_turn"]

Run = Callable[[], object]
"""Enqueues one inference."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuSchedule:
    """How long to measure: rounds of one turn per engine; a turn warms up, then runs for a time, or ``least`` times.

    ``alone`` further runs are taken one by one, by the host's clock.
    """

    rounds: int = 3
    warm_up_ms: float = 200.0
    seconds: float = 1.0
    least: int = 10
    alone: int = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """Milliseconds of the runs of one turn: on the device, to enqueue, alone by the host's clock; and of all of it."""

    compute: Sequence[float]
    enqueue: Sequence[float]
    alone: Sequence[float]
    wall: float


def take_turn(run: Run, device: torch.device, plan: GpuSchedule) -> Turn:
    """Warm up and measure one turn; on a device without events all times are the host's."""
    _warm_up(run, device, plan.warm_up_ms)
    alone = [_timed(run, device) for _ in range(plan.alone)]
    began = perf_counter()
    compute, enqueue = _enqueued(run, plan) if device.type == "cuda" else _called(run, plan)
    return Turn(compute=compute, enqueue=enqueue, alone=alone, wall=_since(began))


def synchronize(device: torch.device) -> None:
    """Wait until the device has nothing left to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def summary(turns: Sequence[Turn]) -> dict[str, object]:
    """Return the figures of all turns of one engine for JSON."""
    rounds = [median(turn.compute) for turn in turns]
    compute = _statistics([turn.compute for turn in turns])
    return {
        "n": sum(len(turn.compute) for turn in turns),
        "throughput_qps": median(1e3 * len(turn.compute) / turn.wall for turn in turns),
        "gpu_ms": compute,
        "latency_ms": compute,  # trtexec's sum of transfers and compute; nothing is transferred
        "enqueue_ms": _statistics([turn.enqueue for turn in turns]),
        "host_ms": _statistics([turn.alone for turn in turns]),
        "round_medians_ms": rounds,
        "spread": (max(rounds) - min(rounds)) / median(rounds),
    }


def _statistics(rounds: Sequence[Sequence[float]]) -> dict[str, float]:
    """Return what trtexec prints; the median is the median of the rounds' medians, the rest is over all runs."""
    values = list(chain.from_iterable(rounds))
    p90, p95, p99 = (float(np.percentile(values, share)) for share in (90, 95, 99))
    middle = median(median(found) for found in rounds)
    ends = {"min": min(values), "max": max(values)}
    return {**ends, "mean": mean(values), "median": middle, "p90": p90, "p95": p95, "p99": p99}


def _warm_up(run: Run, device: torch.device, milliseconds: float) -> None:
    began = perf_counter()
    while _since(began) < milliseconds:
        _timed(run, device)


def _timed(run: Run, device: torch.device) -> float:
    """Return the milliseconds of one run from the call until the device has finished it."""
    began = perf_counter()
    run()
    synchronize(device)
    return _since(began)


def _enqueued(run: Run, plan: GpuSchedule) -> tuple[list[float], list[float]]:
    """Run with one inference enqueued ahead, as trtexec does; return the times on the device and to enqueue."""
    pairs, enqueue, began = list[tuple[torch.cuda.Event, torch.cuda.Event]](), list[float](), perf_counter()
    while len(pairs) < plan.least or _since(began) < 1e3 * plan.seconds:
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        first.record()
        called = perf_counter()
        run()
        enqueue.append(_since(called))
        last.record()
        pairs.append((first, last))
        if len(pairs) > 1:
            pairs[-2][1].synchronize()
    pairs[-1][1].synchronize()
    return [first.elapsed_time(last) for first, last in pairs], enqueue


def _called(run: Run, plan: GpuSchedule) -> tuple[list[float], list[float]]:
    """Run on the host, where a call returns when all is done: to enqueue is to run."""
    times, began = list[float](), perf_counter()
    while len(times) < plan.least or _since(began) < 1e3 * plan.seconds:
        called = perf_counter()
        run()
        times.append(_since(called))
    return times, times


def _since(began: float) -> float:
    return 1e3 * (perf_counter() - began)
