"""How much memory an engine takes, from a short process of its own."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from normfuse.bench.worker_process import EngineSpec, Load, WorkerProcess

__all__ = ["MemoryUse", "measure_memory", "memory_use"]

RUNS: Final = 3
"""The first run allocates the arena, the second may grow it; the third shows that it is steady."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryUse:
    """Resident bytes of a process with one engine.

    ``before_load`` is Python with numpy alone (the runtime is not imported yet), ``after_load`` with the engine
    open, ``peak`` the largest size of the process so far (Linux' VmHWM): loading and runs.
    """

    before_load: int
    after_load: int
    peak: int

    def as_dict(self) -> dict[str, int]:
        """Return the memory for JSON."""
        return asdict(self)


def memory_use(engine: EngineSpec, *, batch: int, threads: int, inputs: Path | None = None) -> MemoryUse:
    """Return what a fresh process takes that opens the engine and runs it three times.

    Raises:
        CheckFailed: the engine cannot be opened or run; the message ends with what it wrote.
    """
    with WorkerProcess(engine, Load(batch=batch, threads=threads, inputs=inputs)) as worker:
        worker.warm_up(RUNS)
        return MemoryUse(**worker.memory())


def measure_memory(engine: EngineSpec, *, batch: int, threads: int, inputs: Path | None = None) -> int:
    """Return the peak of ``memory_use`` alone, in bytes.

    Raises:
        CheckFailed: the engine cannot be opened or run; the message ends with what it wrote.
    """
    return memory_use(engine, batch=batch, threads=threads, inputs=inputs).peak
