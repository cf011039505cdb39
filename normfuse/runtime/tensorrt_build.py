"""Builds TensorRT engines: in a process of its own, with a limit of time, and a clear error for every way to fail."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

from normfuse.atomic import write_file
from normfuse.errors import CheckFailed, MissingDependency, UnsupportedModel
from normfuse.runtime import tensorrt_child

__all__ = ["TENSORRT_RTX", "Backend", "BuildOptions", "BuiltEngine", "build_engine"]

Shapes = tuple[Sequence[int], Sequence[int], Sequence[int]]
"""The smallest, the usual and the largest shape of an input."""

SHOWN: Final = 3
"""Messages of a builder that an error repeats: the last ones."""


@dataclass(frozen=True, slots=True)
class Backend:
    """A library that builds engines: its module, and how to get it."""

    module: str
    install: str


TENSORRT_RTX: Final = Backend("tensorrt_rtx", "pip install 'normfuse[trt-rtx]'")


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildOptions:
    """How an engine is built.

    Attributes:
        shapes: of every input with a free axis, by its name.
        capabilities: what it shall run on, as TensorRT-RTX calls it (``SM89``); empty: the GPU at hand, or of
            TensorRT-RTX any from Ampere on.
        workspace_bytes: what kernels may use beside weights and activations.
        level: the builder's optimization level, 0 to 5.
        seconds: after which the build is given up.
    """

    shapes: Mapping[str, Shapes] = field(default_factory=dict)
    capabilities: tuple[str, ...] = ()
    workspace_bytes: int = 4 << 30
    level: int = 3
    seconds: float = 3600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class BuiltEngine:
    """What was built: the library's version, its warnings, and the kernels that it lists, a line each."""

    version: str
    messages: tuple[str, ...]
    layers: tuple[str, ...]


def build_engine(model: Path, engine: Path, backend: Backend, options: BuildOptions) -> BuiltEngine:
    """Build an engine from an ONNX file; the engine's file appears whole or not at all.

    Raises:
        MissingDependency: the library is not installed, or finds no driver.
        UnsupportedModel: it refuses nodes, or gives no engine.
        CheckFailed: its process ended, or took too long.
    """
    if importlib.util.find_spec(backend.module) is None:
        raise MissingDependency(backend.module, needed_for="building engines", install=backend.install)
    with TemporaryDirectory(prefix="normfuse-build-") as folder:
        made = Path(folder) / "model.engine"
        answer = _asked(_request(model, made, backend, options), Path(folder), options.seconds)
        _refuse_failure(answer, backend)
        write_file(engine, memoryview(made.read_bytes()))
    return BuiltEngine(version=answer["version"], messages=tuple(answer["messages"]), layers=tuple(answer["layers"]))


def _request(model: Path, engine: Path, backend: Backend, options: BuildOptions) -> dict[str, Any]:
    return {
        "module": backend.module,
        "model": str(model.absolute()),
        "engine": str(engine),
        "answer": str(engine.with_suffix(".json")),
        "shapes": {name: [list(each) for each in shapes] for name, shapes in options.shapes.items()},
        "capabilities": list(options.capabilities),
        "workspace_bytes": options.workspace_bytes,
        "level": options.level,
    }


def _asked(request: Mapping[str, Any], folder: Path, seconds: float) -> dict[str, Any]:
    """Return the answer of a child."""
    asked = folder / "request.json"
    asked.write_text(json.dumps(request), encoding="utf-8")
    command = [sys.executable, tensorrt_child.__file__, str(asked)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired as error:
        raise CheckFailed(
            f"the builder took more than {seconds:.0f} s",
            where=request["module"],
            expected="an engine within the time limit",
            hint="a longer limit, or a lower optimization level",
        ) from error
    answer = Path(request["answer"])
    if answer.exists():
        found: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8"))
        return found
    if (library := _unloaded(done.stderr)) is not None:
        raise MissingDependency(library, needed_for=request["module"], install="see the library's installation guide")
    ended = f"signal {-done.returncode}" if done.returncode < 0 else f"exit code {done.returncode}"
    raise CheckFailed(
        f"the builder's process ended with {ended}",
        where=request["module"],
        expected="an engine, or an error",
        hint=f"the ONNX file is kept; the process last said: {_last(done.stderr.splitlines())}",
    )


def _unloaded(said: str) -> str | None:
    """Return the error of a module that could not be loaded: a library of it is missing."""
    lines = [line for line in said.splitlines() if line.startswith(("ImportError", "OSError", "ModuleNotFoundError"))]
    return lines[-1].partition(": ")[2] if lines else None


def _refuse_failure(answer: Mapping[str, Any], backend: Backend) -> None:
    outcome, said = answer["outcome"], _last(answer["messages"])
    if outcome == "no builder":
        raise MissingDependency(
            "a driver of the GPU", needed_for=f"the builder of {backend.module} ({said})", install="a machine with one"
        )
    if outcome == "refused":
        refusals = [f"{each['node'] or each['operator']}: {each['says']}" for each in answer["refusals"]]
        raise UnsupportedModel(
            f"the parser refuses {len(refusals)} node{'s' * (len(refusals) > 1)}",
            where="; ".join(refusals[:SHOWN]),
            expected=f"what {backend.module} {answer['version']} builds",
            hint="normfuse inspect --lint trt names the rules and what to do",
        )
    if outcome == "not built":
        raise UnsupportedModel(
            f"the builder gave no engine: {said}",
            where=f"{backend.module} {answer['version']}",
            expected="an engine",
            hint="shapes for every free axis (--shapes), more workspace, or another GPU, as the message has it",
        )


def _last(messages: Sequence[str]) -> str:
    return " / ".join(messages[-SHOWN:]) or "nothing"
