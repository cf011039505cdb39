"""The output folder: written whole or not at all, verifiable, and opened again."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from normfuse.errors import BadInput, UsageError

__all__ = ["Artifact", "ArtifactWriter", "check_output", "read_artifact", "verify_artifact"]

MANIFEST: Final = "manifest.json"
SCHEMA: Final = 1
MODEL: Final = "model.onnx"


@dataclass(frozen=True, slots=True)
class Artifact:
    """An artifact on disk."""

    folder: Path
    manifest: Mapping[str, Any]

    @property
    def model(self) -> Path:
        """The ONNX file."""
        return self.folder / MODEL

    @property
    def session_config(self) -> dict[str, str]:
        """onnxruntime session entries that the model must be run with."""
        return dict(self.manifest.get("session_config", {}))

    @property
    def report(self) -> dict[str, Any]:
        """The report written beside the model."""
        found: dict[str, Any] = json.loads((self.folder / "report.json").read_text(encoding="utf-8"))
        return found


def check_output(target: Path) -> None:
    """Refuse early what could not be written after minutes of work.

    Raises:
        UsageError: the target exists and is no artifact.
        BadInput: its parent cannot be written.
    """
    if target.exists() and not (target / MANIFEST).is_file() and not (target.is_dir() and not any(target.iterdir())):
        raise UsageError(
            "the output exists and is no normfuse artifact",
            where=str(target),
            expected="a new folder, an empty one, or an artifact to replace",
            hint="choose another -o, or remove it first",
        )
    parent = target.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise BadInput("the output cannot be written", where=str(target), expected=f"write access to {parent}")


class ArtifactWriter:
    """``with ArtifactWriter(target) as writer:`` fills a hidden folder beside the target and renames it at the end.

    Whatever goes wrong, Ctrl-C included, the hidden folder is removed and an older artifact stays as it was.
    """

    def __init__(self, target: Path) -> None:
        self._target = target

    def __enter__(self) -> Self:
        check_output(self._target)
        parent = self._target.absolute().parent
        try:
            parent.mkdir(parents=True, exist_ok=True)
            self.folder = Path(tempfile.mkdtemp(prefix=f".{self._target.name}.partial-", dir=parent))
        except OSError as error:
            raise BadInput(f"the output cannot be written: {error.strerror}", where=str(self._target)) from error
        return self

    def add_file(self, source: Path, name: str) -> None:
        """Copy a file into the artifact, with its external data if it has any."""
        self._guard(lambda: shutil.copyfile(source, self.folder / name))
        data = source.with_name(f"{source.name}.data")
        if data.exists():
            # The model names its data file; both keep that name.
            self._guard(lambda: shutil.copyfile(data, self.folder / data.name))

    def add_text(self, name: str, text: str) -> None:
        """Write a text file."""
        self._guard(lambda: (self.folder / name).write_text(text, encoding="utf-8"))

    def add_json(self, name: str, value: object) -> None:
        """Write a JSON file."""
        self.add_text(name, json.dumps(value, indent=1) + "\n")

    def finish(self, facts: Mapping[str, Any]) -> None:
        """Write the manifest: ``facts`` and the sha256 of every file."""
        files = {path.name: _sha256(path) for path in sorted(self.folder.iterdir())}
        self.add_json(MANIFEST, {"schema": SCHEMA, **facts, "files": files})

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._publish()
        finally:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _publish(self) -> None:
        for path in self.folder.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        self.folder.chmod(0o755)
        old = self.folder.with_name(f"{self.folder.name}.old")
        if self._target.exists():
            self._target.rename(old)
        try:
            self.folder.rename(self._target)
        except BaseException:
            if old.exists():
                old.rename(self._target)
            raise
        shutil.rmtree(old, ignore_errors=True)

    def _guard(self, write: Any) -> None:
        try:
            write()
        except OSError as error:
            raise BadInput(f"the output cannot be written: {error.strerror}", where=str(self._target)) from error


def read_artifact(folder: str | Path) -> Artifact:
    """Open an artifact.

    Raises:
        BadInput: the folder is none, or was written by a newer normfuse.
    """
    path = Path(folder)
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadInput(
            "this is no normfuse artifact", where=str(folder), expected=f"a folder with {MANIFEST}"
        ) from error
    if not isinstance(manifest, dict) or manifest.get("schema") != SCHEMA:
        raise BadInput("the artifact has another format", where=str(folder), expected=f"schema {SCHEMA}")
    return Artifact(path, manifest)


def verify_artifact(folder: str | Path) -> list[str]:
    """Return what is wrong with an artifact's files: changed, missing, or not of it."""
    artifact = read_artifact(folder)
    files: Mapping[str, str] = artifact.manifest.get("files", {})
    problems = []
    for name, expected in files.items():
        path = artifact.folder / name
        if not path.is_file():
            problems.append(f"{name} is missing")
        elif _sha256(path) != expected:
            problems.append(f"{name} is not the file that was written")
    known = {*files, MANIFEST}
    problems += [f"{path.name} is not of this artifact" for path in artifact.folder.iterdir() if path.name not in known]
    return problems


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
