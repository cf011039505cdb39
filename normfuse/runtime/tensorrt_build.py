"""Builds TensorRT engines: in a process of its own, with a limit of time, and a clear error for every way to fail."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

from normfuse.atomic import write_file, write_files, writing
from normfuse.errors import BadInput, MissingDependency, UsageError
from normfuse.manifest import sha256_of
from normfuse.quant.target import Via
from normfuse.runtime import tensorrt_child, torch_tensorrt_child
from normfuse.runtime.ask_process import ask_process
from normfuse.runtime.build_failures import refuse_failure
from normfuse.runtime.engine_sidecar import Sidecar, onnx_sums, sidecar_path, sidecar_text
from normfuse.runtime.shapes import Shapes, check_shapes
from normfuse.runtime.tensorrt_backend import TENSORRT, TENSORRT_RTX, TORCH_TENSORRT, Backend, installed_backend

__all__ = [
    "TENSORRT",
    "TENSORRT_RTX",
    "TORCH_TENSORRT",
    "Backend",
    "BuildOptions",
    "BuiltEngine",
    "build_engine",
    "installed_backend",
]

CHILDREN: Final = {Via.ONNX: tensorrt_child.__file__, Via.TORCH_TENSORRT: torch_tensorrt_child.__file__}
"""The scripts that build, each in a process of its own; they take the same requests and give the same answers."""

KEPT_MESSAGES: Final = 8
KEPT_CHARACTERS: Final = 2000
"""Of a builder's messages in a sidecar: the last ones, and of each the beginning."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildOptions:
    """How an engine is built.

    Attributes:
        shapes: of every input with a free axis, by its name.
        capabilities: what it shall run on, as TensorRT-RTX calls it (``SM89``); empty: the GPU at hand, or of
            TensorRT-RTX any from Ampere on. TensorRT takes none.
        workspace_bytes: what kernels may use beside weights and activations.
        level: the builder's optimization level, 0 to 5.
        seconds: after which the build is given up.
        timing_cache: a file of kernels timed before, which the build reads, if it is there, and adds to; TensorRT-RTX
            times none and leaves it alone.
        version_compatible: whether later versions of TensorRT shall run it too, with the lean runtime of the version
            that built it, which the engine does not hold.

    Raises:
        UsageError: a value is out of range, or shapes are not in order.
    """

    shapes: Mapping[str, Shapes] = field(default_factory=dict)
    capabilities: tuple[str, ...] = ()
    workspace_bytes: int = 4 << 30
    level: int = 3
    seconds: float = 3600.0
    timing_cache: Path | None = None
    version_compatible: bool = False

    def __post_init__(self) -> None:
        for name, value, holds, expected in (
            ("optimization level", self.level, self.level in range(6), "0 to 5"),
            ("workspace", self.workspace_bytes, self.workspace_bytes > 0, "more than 0 bytes"),
            ("time limit", self.seconds, self.seconds > 0, "more than 0 seconds"),
        ):
            if not holds:
                raise UsageError(f"the {name} is {value}", where="building an engine", expected=expected)
        for name, shapes in self.shapes.items():
            check_shapes(name, shapes)


@dataclass(frozen=True, slots=True, kw_only=True)
class BuiltEngine:
    """What was built: the library's version, its warnings, the kernels that it lists, a line each, and the sidecar."""

    version: str
    messages: tuple[str, ...]
    layers: tuple[str, ...]
    sidecar: Sidecar


def build_engine(
    model: Path, engine: Path, backend: Backend, options: BuildOptions, *, program: Path | None = None
) -> BuiltEngine:
    """Build an engine of a model and write it and its sidecar; if that fails, those of before stay as they were.

    Only its owner may read the engine. The timing cache, if there is one, is written after both.

    Args:
        model: the ONNX file, which the sidecar names whatever the engine is built from.
        engine: where the engine is written.
        backend: the library that builds it.
        options: how.
        program: the same model as a torch.export archive, which torch-tensorrt alone reads, in place of the ONNX file.

    Raises:
        MissingDependency: the library is not installed, cannot be loaded, or finds no driver.
        UsageError: capabilities that the library does not build for, or shapes that are missing or do not fit.
        UnsupportedModel: it refuses nodes, has too little workspace, or gives no engine.
        CheckFailed: its process ended, or took too long.
        BadInput: the model or the timing cache cannot be read, or a file cannot be written.
    """
    assert (program is not None) is (backend.via is Via.TORCH_TENSORRT)
    if importlib.util.find_spec(backend.module) is None:
        raise MissingDependency(backend.module, needed_for="building engines", install=backend.install)
    sums = onnx_sums(model)
    with TemporaryDirectory(prefix="normfuse-build-") as folder:
        made, timings = Path(folder) / "model.engine", Path(folder) / "timing.cache"
        with writing(timings):
            timings.write_bytes(held := _held_timings(options.timing_cache))
        request = _request(program or model, made, timings, backend, options)
        answer = ask_process(
            [CHILDREN[backend.via]],
            request,
            of="builder",
            seconds=options.seconds,
            hint="a longer limit (--builder-seconds), or a lower optimization level (--builder-level)",
        )
        refuse_failure(answer, backend.flavour)
        sidecar = _sidecar(made, sums, backend, options, answer)
        files = {engine: made.read_bytes(), sidecar_path(engine): sidecar_text(sidecar).encode()}
        write_files(files, private=[engine])
        if options.timing_cache is not None and (added := timings.read_bytes()) != held:
            write_file(options.timing_cache, added)
    return BuiltEngine(
        version=answer["version"],
        messages=tuple(answer["messages"]),
        layers=tuple(answer["layers"]),
        sidecar=sidecar,
    )


def _held_timings(cache: Path | None) -> bytes:
    """Return what a timing cache holds; nothing where there is none or it is yet to be written."""
    if cache is None or (not cache.exists() and cache.absolute().parent.is_dir()):
        return b""
    try:
        return cache.read_bytes()
    except OSError as error:
        raise BadInput(
            f"the timing cache cannot be read: {error.strerror or error}",
            where=str(cache),
            expected="a file that a build has written, or a new one in a folder that is there",
        ) from error


def _request(model: Path, engine: Path, timings: Path, backend: Backend, options: BuildOptions) -> dict[str, Any]:
    return {
        "module": backend.module,
        "model": str(model.absolute()),
        "engine": str(engine),
        "answer": str(engine.with_suffix(".json")),
        "shapes": {name: [list(each) for each in shapes] for name, shapes in options.shapes.items()},
        "capabilities": list(options.capabilities),
        "workspace_bytes": options.workspace_bytes,
        "level": options.level,
        "timing_cache": None if options.timing_cache is None else str(timings),
        "version_compatible": options.version_compatible,
    }


def _sidecar(
    engine: Path, sums: tuple[str, str | None], backend: Backend, options: BuildOptions, answer: Mapping[str, Any]
) -> Sidecar:
    onnx_sha256, weights_sha256 = sums
    return Sidecar(
        sha256=sha256_of(engine),
        flavour=backend.flavour,
        via=backend.via,
        version=answer["version"],
        capabilities=tuple(answer["capabilities"]),
        onnx_sha256=onnx_sha256,
        weights_sha256=weights_sha256,
        shapes={name: _plain(shapes) for name, shapes in options.shapes.items()},
        workspace_bytes=options.workspace_bytes,
        level=options.level,
        version_compatible=options.version_compatible,
        messages=tuple(text[:KEPT_CHARACTERS] for text in answer["messages"][-KEPT_MESSAGES:]),
    )


def _plain(shapes: Shapes) -> Shapes:
    least, usual, most = shapes
    return tuple(least), tuple(usual), tuple(most)
