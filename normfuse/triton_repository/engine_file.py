"""Whether an artifact's TensorRT engine is one that Triton can serve."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Final

from normfuse.artifact import Artifact
from normfuse.runtime.onnx_session import Port
from normfuse.triton_repository.backends import TENSORRT

__all__ = ["ENGINE", "reason_against_engine"]

ENGINE: Final = "model.engine"
FACTS: Final = f"{ENGINE}.json"
"""Beside the engine: for what it was built, as JSON; ``flavour`` is by which TensorRT."""
FULL: Final = "tensorrt"
RTX: Final = "tensorrt_rtx"


def reason_against_engine(artifact: Artifact, ports: Sequence[Port]) -> str:
    """Return why Triton's tensorrt backend cannot serve the artifact's engine; empty where it can."""
    if ENGINE not in artifact.files:
        return "there is none"
    if (flavour := _flavour(artifact)) != FULL:
        built = "it is TensorRT-RTX's" if flavour == RTX else "nothing says that it is full TensorRT's"
        return f"{built}, and Triton runs those of full TensorRT alone"
    for port in ports:
        if not port.shape:
            return f"{port.name} has no axes, which Triton cannot say of an engine"
        if port.dtype.name not in TENSORRT.types:
            return f"{port.name} is {port.dtype.name}, which Triton's tensorrt backend does not take"
    return ""


def _flavour(artifact: Artifact) -> Any:
    if FACTS not in artifact.files:
        return None
    try:
        facts = json.loads((artifact.folder / FACTS).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return facts.get("flavour") if isinstance(facts, dict) else None
