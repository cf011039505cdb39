"""The parent's end of a worker: starts it, asks, waits no longer than agreed, and ends it whatever happens."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import normfuse
from normfuse.errors import CheckFailed

__all__ = ["EngineSpec", "Load", "WorkerProcess", "worker_environment"]

TAIL: Final = 12
"""Lines of the worker's standard error that an error message shows."""


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """An engine to measure.

    ``kind`` is ``onnxruntime``, ``torch`` (a torch.export archive, run eagerly) or ``torch.compile`` (one, compiled).
    ``ships`` is the file whose size counts, where another one runs in its place.
    """

    label: str
    kind: str
    path: Path
    session_config: Mapping[str, str] = field(default_factory=dict)
    ships: Path | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What every engine of a comparison is run with; ``inputs`` is an ``.npz``, None takes seeded random arrays."""

    batch: int
    threads: int
    inputs: Path | None = None
    seed: int = 0


class WorkerProcess:
    """``with WorkerProcess(engine, load) as worker:`` has the engine open; afterwards the process is gone."""

    def __init__(self, engine: EngineSpec, load: Load, *, start_seconds: float = 180.0) -> None:
        self._engine = engine
        self._load = load
        self._start_seconds = start_seconds
        self.shapes: dict[str, tuple[int, ...]] = {}

    def __enter__(self) -> Self:
        # A file, not a pipe: a pipe that nobody empties stops the worker.
        self._errors = tempfile.TemporaryFile()
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "normfuse.bench.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=worker_environment(self._load.threads),
            text=True,
            encoding="utf-8",
        )
        self._lines: queue.Queue[str] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        try:
            ready = self._ask(self._first_order(), self._start_seconds)
        except BaseException:
            self._end()
            raise
        self.shapes = {name: tuple(sizes) for name, sizes in ready["inputs"].items()}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def warm_up(self, count: int, *, timeout: float = 120.0) -> None:
        """Run ``count`` times.

        Raises:
            CheckFailed: the worker ended, or did not answer within ``timeout`` seconds.
        """
        self._ask({"warmup": count}, timeout)

    def run(self, least: int, *, lasting: float = 0.0, most: int | None = None, timeout: float = 120.0) -> list[float]:
        """Run ``least`` times, then on until ``lasting`` seconds or ``most`` runs; return the milliseconds of each.

        Raises:
            CheckFailed: the worker ended, or did not answer within ``timeout`` seconds.
        """
        asked = {"run": least, "lasting": lasting, "most": most}
        return [float(value) for value in self._ask(asked, timeout)["milliseconds"]]

    def memory(self, *, timeout: float = 120.0) -> dict[str, int]:
        """Return resident bytes: ``before_load``, ``after_load`` and ``peak``.

        Raises:
            CheckFailed: the worker ended, or did not answer within ``timeout`` seconds.
        """
        return {name: int(value) for name, value in self._ask({"memory": 1}, timeout).items()}

    def _first_order(self) -> dict[str, Any]:
        return {
            "kind": self._engine.kind,
            "path": str(self._engine.path),
            "session_config": dict(self._engine.session_config),
            "batch": self._load.batch,
            "threads": self._load.threads,
            "inputs": None if self._load.inputs is None else str(self._load.inputs),
            "seed": self._load.seed,
        }

    def _ask(self, order: dict[str, Any], timeout: float) -> dict[str, Any]:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(order) + "\n")
            self._process.stdin.flush()
            line = self._lines.get(timeout=timeout)
        except queue.Empty:
            raise self._failure(f"the engine did not answer within {timeout:g} s") from None
        except BrokenPipeError:
            line = ""
        if not line:
            code = self._process.wait()
            raise self._failure(f"the engine's process ended with {_exit(code)}")
        found: dict[str, Any] = json.loads(line)
        return found

    def _failure(self, what: str) -> CheckFailed:
        self._process.kill()
        self._process.wait()
        self._errors.seek(0)
        lines = self._errors.read().decode("utf-8", errors="replace").strip().splitlines()
        tail = "\n".join(["", *lines[-TAIL:]]) if lines else ""
        return CheckFailed(what + tail, where=self._engine.label)

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put("")

    def _end(self) -> None:
        self._process.kill()
        self._process.wait()
        self._reader.join(timeout=5)
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                # What was still to be written was meant for a process that is gone.
                with suppress(BrokenPipeError):
                    stream.close()
        self._errors.close()


def _exit(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"exit code {code}"


def worker_environment(threads: int | None = None) -> dict[str, str]:
    """Return the variables of this process, with this very normfuse importable, and fixed threads where given."""
    values = dict(os.environ)
    if threads is not None:
        values |= {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    root = Path(normfuse.__file__).resolve().parents[1]
    if root.name not in ("site-packages", "dist-packages"):
        # A source tree. (Installed packages are found anyway; named here they would stand before Python's own.)
        values["PYTHONPATH"] = os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH", ""))))
    return values
