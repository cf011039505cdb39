"""The output folder: written whole or not at all, verifiable, and opened again."""

from __future__ import annotations

import hashlib
import json
import math
import os
import secrets
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import normfuse
from normfuse.atomic import synchronize, writing
from normfuse.errors import BadInput, InternalError, UsageError

__all__ = ["Artifact", "ArtifactWriter", "check_output", "read_artifact", "verify_artifact"]

FORMAT: Final = "normfuse artifact"
SCHEMA: Final = 1
MANIFEST: Final = "manifest.json"
MODEL: Final = "model.onnx"
REPORT: Final = "report.json"


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
    def files(self) -> dict[str, str]:
        """The sha256 of every file but the manifest, by name."""
        return dict(self.manifest["files"])

    @property
    def session_config(self) -> dict[str, str]:
        """onnxruntime session entries that the model must be run with."""
        return dict(self.manifest.get("session_config", {}))

    @property
    def report(self) -> dict[str, Any]:
        """The report written beside the model.

        Raises:
            BadInput: it is missing or broken.
        """
        return _read_object(self.folder / REPORT, "the artifact has no readable report")


def check_output(target: Path) -> None:
    """Refuse early what could not be written after minutes of work.

    Raises:
        UsageError: the target exists and is neither an empty folder nor an artifact, or holds more than one.
        BadInput: its parent cannot be written.
    """
    target = _resolved(target)
    if os.path.lexists(target):
        _refuse_strangers(target)
    parent = next(folder for folder in target.parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise BadInput("the output cannot be written", where=str(target), expected=f"write access to {parent}")


class ArtifactWriter:
    """``with ArtifactWriter(target) as writer:`` fills a hidden folder beside the target and renames it at the end.

    Add the files, then ``finish``. Whatever goes wrong, Ctrl-C included, the hidden folder is removed and an older
    artifact stays as it was. (A process killed outright may leave ``.NAME.partial-*`` behind; killed between the
    two renames, the older artifact is whole in ``.NAME.partial-*.old``.)
    """

    def __init__(self, target: Path) -> None:
        self._target = _resolved(target)
        self.folder = self._target.with_name(f".{self._target.name}.partial-{secrets.token_hex(4)}")
        self._old = self.folder.with_name(f"{self.folder.name}.old")

    def __enter__(self) -> Self:
        check_output(self._target)
        with writing(self._target):
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            self.folder.mkdir()
        return self

    def add_file(self, source: Path, name: str) -> None:
        """Copy a file into the artifact, with its external data if it has any.

        Raises:
            BadInput: the disk is full or cannot be written.
        """
        with writing(self._target):
            shutil.copyfile(source, self._place(name))
            data = source.with_name(f"{source.name}.data")
            if data.exists():
                # The model names its data file; both keep that name.
                shutil.copyfile(data, self._place(data.name))

    def add_bytes(self, name: str, data: bytes | memoryview) -> None:
        """Write a binary file.

        Raises:
            BadInput: the disk is full or cannot be written.
        """
        with writing(self._target):
            self._place(name).write_bytes(data)

    def add_text(self, name: str, text: str) -> None:
        """Write a text file (UTF-8).

        Raises:
            BadInput: the disk is full or cannot be written.
        """
        with writing(self._target):
            self._place(name).write_text(text, encoding="utf-8", newline="\n")

    def add_json(self, name: str, value: object) -> None:
        """Write a JSON file; floats that JSON does not have (NaN, infinite) become null.

        Raises:
            BadInput: the disk is full or cannot be written.
        """
        self.add_text(name, json.dumps(_strict(value), indent=1, allow_nan=False) + "\n")

    def finish(self, facts: Mapping[str, Any]) -> None:
        """Write the manifest: ``facts`` (verdict, seed, environment, ...) and the sha256 of every file.

        Raises:
            BadInput: the disk is full or cannot be written.
        """
        with writing(self._target):
            files = {path.name: _sha256(path) for path in sorted(self.folder.iterdir())}
        own = {"format": FORMAT, "schema": SCHEMA, "normfuse": normfuse.__version__}
        self.add_json(MANIFEST, {**own, **facts, "files": files})

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                if not (self.folder / MANIFEST).exists():
                    raise InternalError("an artifact was left without a manifest", where="ArtifactWriter.finish")
                with writing(self._target):
                    self._publish()
        finally:
            shutil.rmtree(self.folder, ignore_errors=True)
            if os.path.lexists(self._target):
                shutil.rmtree(self._old, ignore_errors=True)

    def _publish(self) -> None:
        for path in (*self.folder.iterdir(), self.folder):
            synchronize(path)
        check_output(self._target)  # it may have become something else meanwhile
        try:
            if os.path.lexists(self._target):
                self._target.rename(self._old)
            self.folder.rename(self._target)
        except BaseException:
            if self._old.exists() and not os.path.lexists(self._target):
                self._old.rename(self._target)
            raise
        synchronize(self._target.parent)

    def _place(self, name: str) -> Path:
        if not _is_plain(name):
            raise InternalError(f"{name!r} is no plain file name", where="ArtifactWriter")
        return self.folder / name


def read_artifact(folder: str | Path) -> Artifact:
    """Open an artifact; the files are not compared with their sums (``verify_artifact`` does).

    Raises:
        BadInput: the folder is none, lacks files, or was written by another version of the format.
    """
    path = Path(folder)
    manifest = _read_manifest(path)
    if missing := [name for name in {MODEL, *manifest["files"]} if not (path / name).is_file()]:
        raise BadInput(f"the artifact lacks {', '.join(sorted(missing))}", where=str(folder), hint="compile again")
    return Artifact(path, manifest)


def verify_artifact(folder: str | Path) -> list[str]:
    """Return what is wrong with an artifact's files: changed, missing, or not of it; empty where nothing is.

    The manifest is not signed: this finds damage and careless edits, not somebody who rewrites the manifest too.

    Raises:
        BadInput: the folder is no artifact, or was written by another version of the format.
    """
    path = Path(folder)
    files = _read_manifest(path)["files"]
    problems = [problem for name, expected in files.items() if (problem := _problem(path / name, expected))]
    if MODEL not in files:
        problems.append(f"{MODEL} is not in the manifest")
    strangers = sorted(found.name for found in path.iterdir() if found.name not in {*files, MANIFEST})
    return problems + [f"{name} is not of this artifact" for name in strangers]


def _read_manifest(folder: Path) -> dict[str, Any]:
    manifest = _read_object(folder / MANIFEST, "this is no normfuse artifact")
    if manifest.get("format") != FORMAT:
        raise BadInput("this is no normfuse artifact", where=str(folder), expected=f"{MANIFEST} of a {FORMAT}")
    if manifest.get("schema") != SCHEMA:
        raise BadInput(
            f"the artifact has schema {manifest.get('schema')}",
            where=str(folder),
            expected=f"schema {SCHEMA}",
            hint="use the version of normfuse that wrote it, or compile again",
        )
    if not _is_text_by_name(manifest.get("files")) or not _is_text_by_name(manifest.get("session_config", {})):
        raise BadInput("the manifest is broken", where=str(folder / MANIFEST), expected="files and session_config")
    if outside := [name for name in manifest["files"] if not _is_plain(name)]:
        raise BadInput(f"the manifest names {outside[0]!r}", where=str(folder / MANIFEST), expected="plain file names")
    return manifest


def _problem(path: Path, expected: str) -> str:
    if path.is_symlink():
        return f"{path.name} is a link"
    if not path.is_file():
        return f"{path.name} is missing"
    return "" if _sha256(path) == expected else f"{path.name} is not the file that was written"


def _refuse_strangers(target: Path) -> None:
    """Raise unless replacing the target destroys nothing but an artifact."""
    found = {path.name for path in target.iterdir()} if target.is_dir() else {target.name}
    if not found:
        return
    try:
        files = {MANIFEST, *_read_manifest(target)["files"]}
    except BadInput as error:
        raise UsageError(
            "the output exists and is no normfuse artifact",
            where=str(target),
            expected="a new folder, an empty one, or an artifact to replace",
            hint="choose another -o, or remove it first",
        ) from error
    if strangers := sorted(found - files):
        raise UsageError(
            f"the artifact to replace holds files of others: {', '.join(strangers)}",
            where=str(target),
            expected="nothing that would be lost",
            hint="move them away, or choose another -o",
        )


def _resolved(target: Path) -> Path:
    # A link stays a link: what it points to is written.
    return Path(os.path.realpath(target))


def _read_object(path: Path, what: str) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise BadInput(what, where=str(path), expected="a readable JSON file") from error
    if not isinstance(found, dict):
        raise BadInput(what, where=str(path), expected="a JSON object")
    return found


def _is_text_by_name(value: object) -> bool:
    return isinstance(value, dict) and all(
        isinstance(name, str) and isinstance(text, str) for name, text in value.items()
    )


def _is_plain(name: str) -> bool:
    return name not in ("", ".", "..") and not set(name) & {"/", "\\", "\0", ":"}


def _strict(value: object) -> object:
    """Return the value with null for every float that JSON does not have."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: _strict(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(inner) for inner in value]
    return value


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
