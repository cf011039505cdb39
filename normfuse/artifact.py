"""The output folder: written whole or not at all; its reading (``normfuse.manifest``) goes by this name too."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import normfuse
from normfuse.atomic import writing, writing_folder
from normfuse.errors import BadInput, InternalError, UsageError
from normfuse.manifest import (
    FORMAT,
    MANIFEST,
    SCHEMA,
    Artifact,
    is_plain,
    read_artifact,
    read_intact,
    read_manifest,
    read_whole,
    sha256_of,
    verify_artifact,
)
from normfuse.strict_json import strict_json

__all__ = [
    "Artifact",
    "ArtifactWriter",
    "check_output",
    "read_artifact",
    "read_intact",
    "read_whole",
    "verify_artifact",
]


def check_output(target: Path) -> None:
    """Refuse early what could not be written after minutes of work.

    Raises:
        UsageError: the target exists and is neither an empty folder nor an artifact, or holds more than one; or a
            folder cannot be made there.
    """
    target = _resolved(target)
    _refuse_strangers(target)
    parent = next(folder for folder in target.parents if folder.exists())
    trial = parent / f".normfuse-{secrets.token_hex(4)}"
    try:
        # Tried, not asked for: /proc and file systems that are mounted read-only give the superuser every permission.
        trial.mkdir()
        trial.rmdir()
    except OSError as error:
        raise UsageError(
            f"the output cannot be written: {error.strerror or error}",
            where=str(target),
            expected=f"a folder in which one can be made, unlike {parent}",
            hint="choose another -o",
        ) from error


class ArtifactWriter:
    """``with ArtifactWriter(target) as writer:`` fills a hidden folder beside the target and renames it at the end.

    Add the files, then ``finish``. Whatever goes wrong, an older artifact stays as it was (``writing_folder``).
    """

    folder: Path

    def __init__(self, target: Path) -> None:
        self._target = _resolved(target)
        self._writing = writing_folder(self._target, check=self._check)

    def __enter__(self) -> Self:
        check_output(self._target)
        self.folder = self._writing.__enter__()
        return self

    def add_file(self, source: Path, name: str, *, private: bool = False) -> None:
        """Copy a file into the artifact, with its external data if it has any; a private one is its owner's alone.

        Raises:
            BadInput: the disk is full or cannot be written.
        """
        with writing(self._target):
            place = self._place(name)
            if private:
                place.touch(mode=0o600)
            shutil.copyfile(source, place)
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
        self.add_text(name, strict_json(value))

    def finish(self, facts: Mapping[str, Any]) -> None:
        """Write the manifest: ``facts`` (verdict, seed, environment, ...) and the sha256 of every file.

        Raises:
            BadInput: the disk is full or cannot be written.
        """
        with writing(self._target):
            files = {path.name: sha256_of(path) for path in sorted(self.folder.iterdir())}
        own = {"format": FORMAT, "schema": SCHEMA, "normfuse": normfuse.__version__}
        self.add_json(MANIFEST, {**own, **facts, "files": files})

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writing.__exit__(kind, error, trace)

    def _check(self) -> None:
        if not (self.folder / MANIFEST).exists():
            raise InternalError("an artifact was left without a manifest", where="ArtifactWriter.finish")
        _refuse_strangers(self._target)  # it may have become something else meanwhile

    def _place(self, name: str) -> Path:
        if not is_plain(name):
            raise InternalError(f"{name!r} is no plain file name", where="ArtifactWriter")
        return self.folder / name


def _refuse_strangers(target: Path) -> None:
    """Raise unless replacing the target destroys nothing but an artifact."""
    if not os.path.lexists(target):
        return
    found = {path.name for path in target.iterdir()} if target.is_dir() else {target.name}
    if not found:
        return
    try:
        files = {MANIFEST, *read_manifest(target)["files"]}
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
