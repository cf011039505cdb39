"""Times engines against each other: fresh processes, warm-up, rounds in rotating order."""

from __future__ import annotations

import json
import queue
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from types import TracebackType
from typing import Any, Final, Self

import numpy as np

from normfuse.errors import CheckFailed
from normfuse.progress import Progress, Silent

__all__ = ["EngineSpec", "Timing", "measure_memory", "time_engines"]

WARM_UP_RUNS: Final = 3
TARGET_MILLISECONDS: Final = 400.0
"""How long one turn of one engine lasts, about."""

MOST_RUNS_PER_TURN: Final = 100
START_SECONDS: Final = 180.0
TURN_SECONDS: Final = 120.0


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """An engine to measure; ``kind`` is ``onnxruntime`` or ``torch`` (an exported program, run eagerly)."""

    label: str
    kind: str
    path: Path
    session_config: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Milliseconds per run over all rounds, and samples per second at the median."""

    p50: float
    p90: float
    p99: float
    throughput: float
    runs: int
    rounds: tuple[float, ...]

    def as_dict(self) -> dict[str, object]:
        """Return the timing for JSON."""
        return {
            "p50_ms": self.p50,
            "p90_ms": self.p90,
            "p99_ms": self.p99,
            "samples_per_second": self.throughput,
            "runs": self.runs,
            "round_medians_ms": list(self.rounds),
        }


def time_engines(
    engines: Sequence[EngineSpec],
    *,
    batch: int,
    threads: int,
    rounds: int = 7,
    progress: Progress | None = None,
) -> dict[str, Timing]:
    """Return the timing of every engine, by label.

    All processes are open at once and idle but one; each round gives every engine one turn, in an order that
    rotates, so that drift of the machine falls on all alike.

    Raises:
        CheckFailed: an engine crashed or did not answer in time; the message ends with what it wrote.
    """
    shown = progress or Silent()
    times: dict[str, list[list[float]]] = {engine.label: [] for engine in engines}
    with ExitStack() as stack, shown.task("measuring", len(engines) * (rounds + 1)) as advance:
        workers = []
        for engine in engines:
            workers.append(stack.enter_context(_Worker(engine, batch=batch, threads=threads)))
            advance(1)
        runs = [worker.runs_per_turn() for worker in workers]
        for turn in range(rounds):
            order = [(index + turn) % len(workers) for index in range(len(workers))]
            for index in order:
                times[engines[index].label].append(workers[index].run(runs[index]))
                advance(1)
    return {label: _timing(found, batch) for label, found in times.items()}


def measure_memory(engine: EngineSpec, *, batch: int, threads: int) -> int:
    """Return the peak resident bytes of a fresh process that opens the engine and runs it three times."""
    with _Worker(engine, batch=batch, threads=threads) as worker:
        worker.run(WARM_UP_RUNS)
        return worker.peak_bytes()


def _timing(rounds: Sequence[Sequence[float]], batch: int) -> Timing:
    values = np.concatenate([np.asarray(found) for found in rounds])
    p50, p90, p99 = (float(np.percentile(values, share)) for share in (50, 90, 99))
    return Timing(
        p50=p50,
        p90=p90,
        p99=p99,
        throughput=batch * 1e3 / p50,
        runs=len(values),
        rounds=tuple(median(found) for found in rounds),
    )


class _Worker:
    """The other end of a worker process."""

    def __init__(self, engine: EngineSpec, *, batch: int, threads: int) -> None:
        self._engine = engine
        self._order = {
            "kind": engine.kind,
            "path": str(engine.path),
            "batch": batch,
            "threads": threads,
            "session_config": dict(engine.session_config),
        }

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "normfuse.bench.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._lines: queue.Queue[str] = queue.Queue()
        self._errors: list[str] = []
        self._readers = [
            threading.Thread(target=self._read_answers, daemon=True),
            threading.Thread(target=self._read_errors, daemon=True),
        ]
        for reader in self._readers:
            reader.start()
        try:
            self._ask(self._order, START_SECONDS)
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def runs_per_turn(self) -> int:
        """Warm up, and return how many runs fill a turn."""
        slowest = median(self.run(WARM_UP_RUNS))
        return max(2, min(MOST_RUNS_PER_TURN, int(TARGET_MILLISECONDS / max(slowest, 1e-3))))

    def run(self, count: int) -> list[float]:
        """Return the milliseconds of ``count`` runs."""
        return [float(value) for value in self._ask({"run": count}, TURN_SECONDS + count)["milliseconds"]]

    def peak_bytes(self) -> int:
        """Return the peak resident size of the process."""
        return int(self._ask({"memory": 1}, TURN_SECONDS)["peak_bytes"])

    def _ask(self, order: dict[str, Any], seconds: float) -> dict[str, Any]:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(order) + "\n")
            self._process.stdin.flush()
            line = self._lines.get(timeout=seconds)
        except (queue.Empty, BrokenPipeError):
            line = ""
        if not line:
            self._process.kill()
            self._process.wait()
            self._readers[1].join(timeout=5)
            tail = " ".join("".join(self._errors).strip().splitlines()[-3:])
            raise CheckFailed(
                f"the engine did not answer: {tail or f'nothing for {seconds:.0f} s'}",
                where=self._engine.label,
                hint="run it alone: `normfuse benchmark DIR`",
            )
        found: dict[str, Any] = json.loads(line)
        return found

    def _read_answers(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put("")

    def _read_errors(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            self._errors.append(line)

    def _end(self) -> None:
        self._process.kill()
        self._process.wait()
        for reader in self._readers:
            reader.join(timeout=5)
        for stream in (self._process.stdin, self._process.stdout, self._process.stderr):
            if stream is not None:
                stream.close()
