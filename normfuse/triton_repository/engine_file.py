"""Whether an artifact's TensorRT engine is one that Triton can serve."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from normfuse.artifact import Artifact
from normfuse.errors import BadInput
from normfuse.manifest import ENGINE
from normfuse.quant.target import Via
from normfuse.runtime.engine_sidecar import Sidecar, check_engine, read_sidecar, sidecar_path
from normfuse.runtime.onnx_session import Port
from normfuse.runtime.tensorrt_backend import TENSORRT as FULL
from normfuse.runtime.tensorrt_backend import TENSORRT_RTX as RTX
from normfuse.triton_repository.backends import TENSORRT

__all__ = ["batches_of_engine", "reason_against_engine"]


def reason_against_engine(artifact: Artifact, ports: Sequence[Port], *, trust: bool) -> str:
    """Return why Triton's tensorrt backend shall not serve the artifact's engine; empty where it can.

    It is checked as before it is loaded (``check_engine``, with ``trust``).
    """
    if ENGINE not in artifact.files:
        return "there is none"
    sidecar = _sidecar(artifact)
    if sidecar is None or sidecar.flavour != FULL.flavour:
        is_rtx = sidecar is not None and sidecar.flavour == RTX.flavour
        built = "it is TensorRT-RTX's" if is_rtx else "nothing says that it is full TensorRT's"
        return f"{built}, and Triton runs those of full TensorRT alone"
    engine = artifact.folder / ENGINE
    try:
        check_engine(
            engine, backend_module=FULL.module, backend_version=sidecar.version, onnx=artifact.model, trust=trust
        )
    except BadInput as error:
        return f"{error.what} ({error.hint})"
    if sidecar.via is Via.TORCH_TENSORRT:
        return "torch-tensorrt built it, which calls outputs output0, output1 and so on, and not by their names"
    for port in ports:
        if not port.shape:
            return f"{port.name} has no axes, which Triton cannot say of an engine"
        if port.dtype.name not in TENSORRT.types:
            return f"{port.name} is {port.dtype.name}, which Triton's tensorrt backend does not take"
    return ""


def batches_of_engine(artifact: Artifact, inputs: Sequence[Port]) -> range | None:
    """Return the batches that the artifact's engine was built for; None where its sidecar says nothing of them.

    A batch is the first size of every input that begins with a free axis.
    """
    shapes = read_sidecar(artifact.folder / ENGINE).shapes
    found = [shapes[port.name] for port in inputs if port.name in shapes and port.shape and port.shape[0] is None]
    if not found:
        return None
    return range(max(least[0] for least, _, _ in found), min(most[0] for _, _, most in found) + 1)


def _sidecar(artifact: Artifact) -> Sidecar | None:
    """Return what is written beside the engine; None where nothing is, or it cannot be read."""
    if sidecar_path(Path(ENGINE)).name not in artifact.files:
        return None
    try:
        return read_sidecar(artifact.folder / ENGINE)
    except BadInput:
        return None
