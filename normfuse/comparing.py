"""Measures artifacts that exist, against each other and against the model they come from."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from normfuse.artifact import Artifact, read_artifact
from normfuse.bench.environment import default_threads, describe_environment
from normfuse.bench.timing import EngineSpec
from normfuse.build import write_float
from normfuse.compiler import capture_model
from normfuse.data import InputSpec, Samples, check_samples
from normfuse.graph import Graph
from normfuse.graph.program import to_program
from normfuse.loading import LoadedModel
from normfuse.measure import Measured, compare_engines
from normfuse.progress import Progress
from normfuse.runtime.onnx_session import open_onnx

__all__ = ["compare_artifacts"]


def compare_artifacts(
    folders: Sequence[Path],
    *,
    against: LoadedModel | None,
    evaluation: Samples | None,
    batch: int,
    threads: int,
    progress: Progress,
) -> dict[str, Any]:
    """Return a comparison as plain data; with ``against``, eager PyTorch and float onnxruntime are in it.

    Raises:
        BadInput: a folder is no artifact.
        CheckFailed: an engine crashed.
    """
    threads = default_threads(threads)
    artifacts = [read_artifact(folder) for folder in folders]
    with tempfile.TemporaryDirectory(prefix="normfuse-") as folder:
        engines = _baselines(against, Path(folder), progress) if against is not None else []
        engines += [
            EngineSpec(_label(found, folders), "onnxruntime", found.model, found.session_config) for found in artifacts
        ]
        bound = _bound(evaluation, artifacts[0]) if evaluation is not None else None
        first = open_onnx(artifacts[0].model, threads=threads).inputs[0].shape[0]
        fixed = first if isinstance(first, int) else None
        what = Measured(engines=engines, evaluation=bound, fixed_batch=fixed)
        comparison = compare_engines(what, batch=batch, threads=threads, speed=True, progress=progress)
    return {"comparison": comparison.as_dict(), "environment": describe_environment().as_dict()}


def _label(artifact: Artifact, folders: Sequence[Path]) -> str:
    names = [folder.resolve().name for folder in folders]
    own = artifact.folder.resolve().name
    return own if names.count(own) == 1 else str(artifact.folder)


def _baselines(model: LoadedModel, folder: Path, progress: Progress) -> list[EngineSpec]:
    graph = capture_model(model)
    with progress.task("building the float baseline"):
        _save(graph, folder / "eager.pt2")
        write_float(graph, folder / "float.onnx")
    return [
        EngineSpec("float", "onnxruntime", folder / "float.onnx"),
        EngineSpec("PyTorch eager", "torch", folder / "eager.pt2"),
    ]


def _save(graph: Graph, path: Path) -> None:
    torch.export.save(to_program(graph), path)


def _bound(samples: Samples, artifact: Artifact) -> Samples:
    ports = open_onnx(artifact.model, threads=1).inputs
    return check_samples(samples, [InputSpec(port.name, _sizes(port.shape), port.dtype.name) for port in ports])


def _sizes(shape: Sequence[int | str | None]) -> tuple[int | None, ...]:
    """Return the shape with None for every axis of any size; the first is the batch."""
    return (None, *(size if isinstance(size, int) else None for size in shape[1:]))
