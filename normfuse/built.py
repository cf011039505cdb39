"""A finished compile: saved as an artifact, opened as a session, and opened again from the folder."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from normfuse.artifact import ArtifactWriter, read_intact
from normfuse.bench.environment import default_threads
from normfuse.build import Engine
from normfuse.checkpoint import remove_checkpoint
from normfuse.errors import BadInput, NormfuseError
from normfuse.export.widened import is_bfloat16, write_widened
from normfuse.manifest import ENGINE, MODEL
from normfuse.page import render_page
from normfuse.recipe import Recipe
from normfuse.runtime.onnx_session import OnnxSession, open_onnx

__all__ = ["Built", "Workspace", "load"]


class Workspace:
    """A temporary folder that lives as long as somebody holds it."""

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="normfuse-"))
        self._end = weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)

    def model(self, label: str) -> Path:
        """Return where an engine is written: under its final name, which a model with external data knows.

        Every call gives another place.
        """
        return Path(tempfile.mkdtemp(prefix=f"{label}-", dir=self.path)) / MODEL


@dataclass(frozen=True, slots=True, kw_only=True)
class Built:
    """A finished compile that has no place yet: ``report`` is plain data, ``save`` writes the artifact.

    ``files`` are what the target's builder made, by the names that they get; ``failure`` says why it made none.
    """

    recipe: Recipe
    report: dict[str, Any]
    engine: Engine
    holds: bool
    folder: Workspace = field(repr=False)
    resume: str | Path | None = None
    files: Mapping[str, Path] = field(default_factory=dict)
    failure: NormfuseError | None = None

    def save(self, target: str | Path) -> None:
        """Write the artifact, whole or not at all; what was kept to go on from is then removed.

        Raises:
            UsageError: the folder exists and is no artifact.
            BadInput: it cannot be written.
        """
        report, recipe = self.report, self.recipe.to_toml()
        with ArtifactWriter(Path(target)) as writer:
            writer.add_file(self.engine.path, MODEL)
            for name, path in self.files.items():
                writer.add_file(path, name, private=name == ENGINE)
            writer.add_text("recipe.toml", recipe)
            writer.add_json("ranges.json", self.engine.ranges.as_dict() if self.engine.ranges else {})
            writer.add_json("report.json", report)
            writer.add_text("report.html", render_page(report))
            writer.finish(
                {
                    "model": report["model"],
                    "recipe_sha256": hashlib.sha256(recipe.encode()).hexdigest(),
                    "seed": self.recipe.seed,
                    "session_config": self.engine.session_config,
                    "verdict": report["verdict"],
                    "environment": report["environment"],
                }
            )

        if self.resume is not None:
            remove_checkpoint(Path(self.resume))

    def session(self, *, threads: int = 0) -> OnnxSession:
        """Open the engine that ``save`` would write."""
        return _opened(self.engine.path, self.engine.session_config, threads)


def load(folder: str | Path, *, threads: int = 0) -> OnnxSession:
    """Open an artifact as a callable session: ``session(image=array)["output"]``.

    Of one in bfloat16, which onnxruntime may have no kernels for, a copy is opened that computes in float32.

    Raises:
        BadInput: the folder is no artifact, its model is not the one that was written, or it cannot be opened.
    """
    artifact = read_intact(folder)
    return _opened(artifact.model, artifact.session_config, threads)


def _opened(model: Path, session_config: Mapping[str, str], threads: int) -> OnnxSession:
    open_model = partial(open_onnx, threads=default_threads(threads), session_config=session_config)
    try:
        return open_model(model)
    except BadInput:
        if not is_bfloat16(model):
            raise
    with tempfile.TemporaryDirectory(prefix="normfuse-") as place:
        widened = Path(place) / model.name
        write_widened(model, widened)
        return open_model(widened)
