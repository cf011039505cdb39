"""TensorRT engines run and timed on a GPU by a process of its own: their outputs, and times in trtexec's terms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from normfuse.bench.gpu_timing import GpuSchedule
from normfuse.bench.worker_process import worker_environment
from normfuse.errors import BadInput, CheckFailed, InternalError, NormfuseError, UnsupportedModel
from normfuse.runtime.ask_process import ask_process
from normfuse.runtime.tensorrt_backend import Backend

__all__ = ["EngineJob", "EngineRun", "EngineRuns", "run_engines"]

Array = NDArray[Any]

ERRORS: Final[dict[str, type[NormfuseError]]] = {
    kind.__name__: kind for kind in (BadInput, CheckFailed, UnsupportedModel)
}
LIMIT_SECONDS: Final = 3600.0
"""After which engines are given up. How long a run takes that must be taken so often, nobody knows before."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineJob:
    """An engine to run: its file, the ONNX file that it must have been built from, and its inputs by name."""

    label: str
    engine: Path
    onnx: Path | None
    feeds: Mapping[str, Array]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineRun:
    """What an engine computed, and its times (``normfuse.bench.gpu_timing.summary``), in milliseconds.

    ``graph`` are those of the inference recorded as a CUDA graph; None where there is none, and ``no_graph`` says why.
    """

    label: str
    outputs: Mapping[str, Array]
    plain: Mapping[str, Any]
    graph: Mapping[str, Any] | None
    no_graph: str


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineRuns:
    """Engines measured in turns on one device; ``states`` are its clocks, temperature and power after every round."""

    runs: tuple[EngineRun, ...]
    device: Mapping[str, Any]
    states: tuple[Mapping[str, Any], ...]


def run_engines(
    jobs: Sequence[EngineJob],
    backend: Backend,
    *,
    schedule: GpuSchedule | None = None,
    trust: bool = False,
    device: str = "cuda",
) -> EngineRuns:
    """Run every engine once, then time all of them in turns: plain, and as a CUDA graph; nothing is transferred.

    Args:
        jobs: the engines; each label once.
        backend: the library that runs them.
        schedule: how long to measure; None: as ``GpuSchedule`` has it.
        trust: engines without a sidecar are taken.
        device: PyTorch's name of the GPU. On ``cpu`` (which only tests have a library for) times are the host's.

    Raises:
        BadInput: an engine that ``check_engine`` refuses or the library does not load, or inputs that do not fit.
        UnsupportedModel: outputs whose shape depends on values, or no room.
        MissingDependency: the library cannot be loaded.
        CheckFailed: an engine does not run, or its process ended or took too long.
    """
    planned = schedule or GpuSchedule()
    with TemporaryDirectory(prefix="normfuse-run-") as folder:
        answer = _asked(_request(jobs, backend, planned, Path(folder), trust=trust, device=device))
        runs = tuple(_run(each) for each in answer["engines"])
    return EngineRuns(runs=runs, device=answer["device"], states=tuple(answer["states"]))


def _request(
    jobs: Sequence[EngineJob], backend: Backend, schedule: GpuSchedule, folder: Path, *, trust: bool, device: str
) -> dict[str, Any]:
    engines = []
    for index, job in enumerate(jobs):
        place = folder / str(index)
        place.mkdir()
        engines.append(
            {
                "label": job.label,
                "engine": str(job.engine.absolute()),
                "onnx": None if job.onnx is None else str(job.onnx.absolute()),
                "inputs": _written(job.feeds, place),
                "outputs": str(place),
            }
        )
    return {
        "module": backend.module,
        "device": device,
        "trust": trust,
        "schedule": asdict(schedule),
        "engines": engines,
        "answer": str(folder / "answer.json"),
    }


def _written(feeds: Mapping[str, Array], place: Path) -> dict[str, str]:
    """Write the inputs under numbers, because their names are no file names; return the files by name."""
    files = {}
    for index, (name, array) in enumerate(feeds.items()):
        files[name] = str(place / f"input_{index}.npy")
        np.save(files[name], array, allow_pickle=False)
    return files


def _asked(request: Mapping[str, Any]) -> dict[str, Any]:
    """Return the answer of a worker; an error that it met is raised here."""
    found = ask_process(
        ["-P", "-m", "normfuse.bench.engine_worker"],
        request,
        of="engine",
        seconds=LIMIT_SECONDS,
        hint="fewer engines at once, or a GPU that nobody else uses",
        environment=worker_environment(),
    )
    if (told := found.get("error")) is not None:
        kind = ERRORS.get(told.pop("kind"))
        raise kind(**told) if kind else InternalError(told["what"], where=told["where"])
    return found


def _run(found: Mapping[str, Any]) -> EngineRun:
    return EngineRun(
        label=found["label"],
        outputs={name: np.load(file, allow_pickle=False) for name, file in found["outputs"].items()},
        plain=found["plain"],
        graph=found["graph"],
        no_graph=found["no_graph"],
    )
