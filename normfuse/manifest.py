"""An artifact on disk: its manifest, whether its files are the ones that were written, and opening it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from normfuse.errors import BadInput

__all__ = [
    "CERTIFICATE",
    "ENGINE",
    "FOLDED",
    "FOLDED_MODEL",
    "FORMAT",
    "MANIFEST",
    "MODEL",
    "SCHEMA",
    "Artifact",
    "is_plain",
    "read_artifact",
    "read_intact",
    "read_manifest",
    "read_whole",
    "require_engine",
    "sha256_of",
    "verify_artifact",
]

FORMAT: Final = "normfuse artifact"
SCHEMA: Final = 1
MANIFEST: Final = "manifest.json"
MODEL: Final = "model.onnx"
ENGINE: Final = "model.engine"
"""What a target's builder made of the model, if it has one."""

REPORT: Final = "report.json"
FOLDED: Final = "fold"
"""The kind of an artifact that holds a folded model and its certificate, and no engine."""
FOLDED_MODEL: Final = "model.pt2"
CERTIFICATE: Final = "certificate.json"


@dataclass(frozen=True, slots=True)
class Artifact:
    """An artifact on disk."""

    folder: Path
    manifest: Mapping[str, Any]

    @property
    def is_folded(self) -> bool:
        """Whether it holds a folded model and no engine."""
        return self.manifest.get("kind") == FOLDED

    @property
    def model(self) -> Path:
        """The ONNX file, or the archive of a folded model."""
        return self.folder / _model_name(self.manifest)

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
        """The report written beside the model; a folded one's certificate.

        Raises:
            BadInput: it is missing or broken.
        """
        name = CERTIFICATE if self.is_folded else REPORT
        return _read_object(self.folder / name, "the artifact has no readable report")


def read_artifact(folder: str | Path) -> Artifact:
    """Open an artifact; the files are not compared with their sums (``read_intact`` and ``verify_artifact`` do).

    Raises:
        BadInput: the folder is none, lacks files, or was written by another version of the format.
    """
    path = Path(folder)
    manifest = read_manifest(path)
    if missing := [name for name in {_model_name(manifest), *manifest["files"]} if not (path / name).is_file()]:
        raise BadInput(f"the artifact lacks {', '.join(sorted(missing))}", where=str(folder), hint="compile again")
    return Artifact(path, manifest)


def read_intact(folder: str | Path) -> Artifact:
    """Open an artifact to run it: what the engine is made of is what was written.

    Raises:
        BadInput: as ``read_artifact``; or the model, or its external data, is another file; or there is no engine.
    """
    artifact = read_artifact(folder)
    require_engine(artifact)
    sums = {MODEL: "", **{name: sum_ for name, sum_ in artifact.files.items() if name.startswith(MODEL)}}
    if changed := [name for name, expected in sums.items() if sha256_of(artifact.folder / name) != expected]:
        raise BadInput(
            f"the artifact is damaged: {changed[0]} is not the file that was written",
            where=str(folder),
            expected=f"files with the sha256 that {MANIFEST} says",
            hint="copy the folder again, or compile again (normfuse verify checks every file)",
        )
    return artifact


def require_engine(artifact: Artifact) -> None:
    """Raise where an artifact has nothing to run.

    Raises:
        BadInput: it holds a folded model.
    """
    if artifact.is_folded:
        raise BadInput(
            "the artifact holds a folded model and no engine",
            where=str(artifact.folder),
            expected="what normfuse compile wrote",
            hint=f"normfuse compile {artifact.model}, or torch.export.load of that file",
        )


def read_whole(folder: str | Path) -> Artifact:
    """Open an artifact all of whose files are the ones that were written.

    Raises:
        BadInput: as ``read_artifact``; or a file was changed, is a link, or is not of the artifact.
    """
    artifact = read_artifact(folder)
    if problems := verify_artifact(folder):
        raise BadInput(
            f"the artifact is damaged: {'; '.join(problems)}",
            where=str(folder),
            expected=f"the files that {MANIFEST} names, with their sha256, and no others",
            hint="copy the folder again, or compile again",
        )
    return artifact


def verify_artifact(folder: str | Path) -> list[str]:
    """Return what is wrong with an artifact's files: changed, missing, or not of it; empty where nothing is.

    The manifest is not signed: this finds damage and careless edits, not somebody who rewrites the manifest too.

    Raises:
        BadInput: the folder is no artifact, or was written by another version of the format.
    """
    path = Path(folder)
    manifest = read_manifest(path)
    files, model = manifest["files"], _model_name(manifest)
    problems = [problem for name, expected in files.items() if (problem := _problem(path / name, expected))]
    if model not in files:
        problems.append(f"{model} is not in the manifest")
    strangers = sorted(found.name for found in path.iterdir() if found.name not in {*files, MANIFEST})
    return problems + [f"{name} is not of this artifact" for name in strangers]


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest, with files and session entries of the right form.

    Raises:
        BadInput: the folder is no artifact, or was written by another version of the format.
    """
    if not folder.is_dir():
        state = "is a file" if folder.exists() else "does not exist"
        raise BadInput(
            f"the folder {state}", where=str(folder), expected="the folder of an artifact", hint="check the path"
        )
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
    if outside := [name for name in manifest["files"] if not is_plain(name)]:
        raise BadInput(f"the manifest names {outside[0]!r}", where=str(folder / MANIFEST), expected="plain file names")
    return manifest


def _model_name(manifest: Mapping[str, Any]) -> str:
    return FOLDED_MODEL if manifest.get("kind") == FOLDED else MODEL


def _problem(path: Path, expected: str) -> str:
    if path.is_symlink():
        return f"{path.name} is a link"
    if not path.is_file():
        return f"{path.name} is missing"
    return "" if sha256_of(path) == expected else f"{path.name} is not the file that was written"


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


def is_plain(name: str) -> bool:
    """Whether a file of this name is in the folder itself."""
    return name not in ("", ".", "..") and not set(name) & {"/", "\\", "\0", ":"}


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
