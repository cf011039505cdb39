"""An artifact written as a model of a Triton model repository, whole or not at all; other models are left alone."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

from normfuse.artifact import Artifact, read_whole
from normfuse.atomic import writing, writing_folder
from normfuse.errors import BadInput, UsageError
from normfuse.manifest import ENGINE, MODEL, require_engine
from normfuse.runtime.onnx_session import Port
from normfuse.triton_repository.backends import ONNXRUNTIME, TENSORRT, Backend
from normfuse.triton_repository.engine_file import batches_of_engine, reason_against_engine
from normfuse.triton_repository.model_config import ModelConfig, can_batch
from normfuse.triton_repository.opened_by_triton import difference_in_triton
from normfuse.triton_repository.read_ports import read_ports

__all__ = ["Served", "Serving", "write_repository"]

CONFIG: Final = "config.pbtxt"
VERSION: Final = "1"
BATCH: Final = 8
MARKER: Final = (
    "# written by normfuse report, which replaces it as long as nothing is changed or added; sha256 of the rest: "
)
OURS: Final = re.compile(
    rf"{re.escape(CONFIG)}|{VERSION}(/model\.plan|/model\.onnx(/model\.onnx|/[^/]+\.onnx\.data)?)?"
)
"""The paths that a model written by this module may hold."""
NAME: Final = re.compile(r"(?!.*\.\.)[A-Za-z0-9_][A-Za-z0-9_.-]*")


@dataclass(frozen=True, slots=True, kw_only=True)
class Serving:
    """How a model is served; None leaves the choice to the artifact.

    ``name`` is the folder's, else; ``largest_batch`` where requests can be put together what the engine was built
    for, or 8, else 0; ``engine`` is whether the TensorRT engine is served (else: where there is one that Triton can
    take); ``trust_engine`` takes one that was built elsewhere.
    """

    name: str | None = None
    largest_batch: int | None = None
    instances: int = 1
    engine: bool | None = None
    trust_engine: bool = False


@dataclass(frozen=True, slots=True)
class Served:
    """What was written where; ``warnings`` are why answers may differ, ``notes`` why something else is served."""

    folder: Path
    config: ModelConfig
    files: Sequence[str]
    notes: Sequence[str]
    warnings: Sequence[str]

    def as_dict(self) -> dict[str, Any]:
        """Return it as plain data."""
        config = self.config
        return {
            "folder": str(self.folder),
            "name": config.name,
            "backend": config.backend.name,
            "max_batch_size": config.largest_batch,
            "instances": config.instances,
            "files": list(self.files),
            "notes": list(self.notes),
            "warnings": list(self.warnings),
        }


def write_repository(folder: str | Path, repository: str | Path, serving: Serving | None = None) -> Served:
    """Write ``repository/NAME``: a configuration, and the artifact's engine as its version 1.

    Raises:
        BadInput: the artifact is damaged, a folded one, or of tensors that Triton cannot take; or the disk is full.
        UsageError: Triton cannot take the name, the model no batches, or there is no engine for it; or what is there
            was not written by this function, or was changed since.
    """
    serving = serving or Serving()
    artifact = read_whole(folder)
    require_engine(artifact)
    target = _target(artifact, Path(repository), serving.name)
    inputs, outputs = read_ports(artifact.model)
    backend, notes = _backend(artifact, (*inputs, *outputs), serving)
    taken, left = _entries(artifact, backend)
    built_for = batches_of_engine(artifact, inputs) if backend is TENSORRT else None
    config = ModelConfig(
        name=target.name,
        backend=backend,
        inputs=inputs,
        outputs=outputs,
        largest_batch=_largest_batch((*inputs, *outputs), serving.largest_batch, built_for),
        instances=serving.instances,
        parameters=taken,
    )
    sources = _sources(artifact, backend)
    _write(target, config, sources, artifact)
    unknown = built_for is None and backend is TENSORRT
    return Served(target, config, (CONFIG, *sources), (*notes, *(_limits(config) if unknown else ())), left)


def _target(artifact: Artifact, repository: Path, name: str | None) -> Path:
    name = artifact.folder.resolve().name if name is None else name
    if not NAME.fullmatch(name):
        raise UsageError(
            f"{name!r} is no name of a model that Triton takes",
            where="--name",
            expected="letters, digits, '_', '-' and '.', none of the last two in front and no two dots on end",
            hint="--name NAME",
        )
    target = repository / name
    if target.resolve().is_relative_to(artifact.folder.resolve()):
        raise UsageError("the repository would be inside of the artifact", where=str(target), hint="choose another")
    _refuse_others(target)
    return target


def _backend(artifact: Artifact, ports: Sequence[Port], serving: Serving) -> tuple[Backend, list[str]]:
    """Return what serves it, and why it is not the engine where there is one."""
    engine, against = serving.engine, reason_against_engine(artifact, ports, trust=serving.trust_engine)
    if engine and against:
        raise UsageError(
            f"Triton cannot serve this artifact's engine: {against}",
            where=str(artifact.folder),
            hint="leave --engine out: then it is the ONNX file that is served",
        )
    if engine is not False and not against:
        return TENSORRT, []
    for port in ports:
        if port.dtype.name not in ONNXRUNTIME.types:
            raise BadInput(
                f"{port.name} is {port.dtype.name}",
                where=str(artifact.model),
                expected=f"types that Triton's onnxruntime backend takes: {', '.join(ONNXRUNTIME.types)}",
            )
    said = engine is None and ENGINE in artifact.files
    return ONNXRUNTIME, [f"the ONNX file is served, not the engine: {against}"] if said else []


def _entries(artifact: Artifact, backend: Backend) -> tuple[dict[str, str], list[str]]:
    """Return the session entries that Triton passes on, and a warning about each other, with what it changes."""
    if backend is not ONNXRUNTIME:
        return {}, []
    entries, difference = artifact.session_config, difference_in_triton(artifact)
    measured = (
        "its answers may differ" if difference is None else f"on random inputs its answers differ by {difference:.2g}"
    )
    taken = {name: value for name, value in entries.items() if name in backend.session_entries}
    left = ", ".join(f"{name} = {value}" for name, value in entries.items() if name not in taken)
    told = f"Triton's onnxruntime backend has no way to set {left}, with which this engine was checked: {measured}"
    return taken, [f"{told}, and it may be slower"] if left else []


def _largest_batch(ports: Sequence[Port], asked: int | None, built_for: range | None) -> int:
    possible = can_batch(ports) and (built_for is None or 1 in built_for)
    if asked and not possible:
        raise UsageError(
            "requests for this model cannot be put together",
            where=f"--max-batch {asked}",
            expected="inputs and outputs that all begin with the same free axis, and an engine for batches from 1 on",
            hint="--max-batch 0, or leave it out",
        )
    if built_for is not None and asked and asked not in built_for:
        raise UsageError(
            f"the engine was built for batches of at most {max(built_for)}",
            where=f"--max-batch {asked}",
            expected=f"{max(built_for)} or less",
            hint="compile with larger --shapes, or serve smaller batches",
        )
    if asked is not None:
        return asked
    return 0 if not possible else BATCH if built_for is None else max(built_for)


def _limits(config: ModelConfig) -> list[str]:
    if not config.largest_batch:
        return []
    return [f"Triton loads the engine only if it was built for batches of {config.largest_batch} (--max-batch)"]


def _sources(artifact: Artifact, backend: Backend) -> dict[str, str]:
    """Return the names of the artifact's files by their paths in the model's folder."""
    opened = f"{VERSION}/{backend.file}"
    if backend is TENSORRT:
        return {opened: ENGINE}
    if data := [name for name in artifact.files if name.endswith(".onnx.data")]:
        # "An ONNX model composed from multiple files must be contained in a directory" (Triton, Model Files).
        return {f"{opened}/{name}": name for name in (MODEL, *data)}
    return {opened: MODEL}


def _write(target: Path, config: ModelConfig, sources: Mapping[str, str], artifact: Artifact) -> None:
    text = config.text()
    with writing_folder(target, check=partial(_refuse_others, target)) as folder, writing(target):
        for place, name in sources.items():
            (folder / place).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(artifact.folder / name, folder / place)
        (folder / CONFIG).write_text(f"{_mark(text)}\n{text}", encoding="utf-8", newline="\n")


def _refuse_others(target: Path) -> None:
    """Raise unless replacing the target destroys nothing but what this module wrote."""
    if not os.path.lexists(target) or _is_ours(target):
        return
    raise UsageError(
        "the repository holds a model of this name that normfuse report did not write, or that was changed since",
        where=str(target),
        expected="a new name, or a model to replace as it was written",
        hint="choose another --name, or move it away first",
    )


def _is_ours(target: Path) -> bool:
    if not target.is_dir():
        return False
    found = list(target.rglob("*"))
    if not all(OURS.fullmatch(path.relative_to(target).as_posix()) and not path.is_symlink() for path in found):
        return False
    if not found:
        return True
    try:
        mark, _, text = (target / CONFIG).read_text(encoding="utf-8").partition("\n")
    except (OSError, UnicodeDecodeError):
        return False
    return mark == _mark(text)


def _mark(text: str) -> str:
    return f"{MARKER}{hashlib.sha256(text.encode()).hexdigest()}"
