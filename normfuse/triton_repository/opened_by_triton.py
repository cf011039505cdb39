"""Whether a file answers the same in Triton's onnxruntime backend, which sets no session entries."""

from __future__ import annotations

from typing import Final

from normfuse.artifact import Artifact
from normfuse.bench.inputs import Wanted, make_inputs
from normfuse.errors import BadInput
from normfuse.runtime.agreement import output_error
from normfuse.runtime.onnx_session import SESSION_ENTRIES, OnnxSession, open_onnx

__all__ = ["difference_in_triton"]

REFUSED: Final = 0.05
"""Of the largest output: a few codes of eight bits that round otherwise move outputs by less."""
HINT: Final = "compile where full TensorRT is installed and serve that engine, or compile with --target onnx"


def difference_in_triton(artifact: Artifact) -> float | None:
    """Return by how much outputs differ without the artifact's session entries, relative to the largest.

    On random inputs, free axes of size 1; None where the model does not run on such ones.

    Raises:
        BadInput: onnxruntime does not open the file without them, or answers something else.
    """
    try:
        opened = open_onnx(artifact.model)
    except BadInput as error:
        raise BadInput(
            f"{error.what}, opened as Triton's onnxruntime backend opens it",
            where=str(artifact.model),
            expected="operators and types that onnxruntime computes on processors, without session entries",
            hint=HINT,
        ) from error
    # Triton's own entry is of memory alone, and none of ours.
    entries = {name: value for name, value in artifact.session_config.items() if name in SESSION_ENTRIES}
    if not entries:
        return 0.0
    found = _difference(opened, open_onnx(artifact.model, session_config=entries))
    if found is not None and not found <= REFUSED:
        raise BadInput(
            f"opened as Triton's onnxruntime backend opens it, its outputs differ by {found:.2g} of the largest",
            where=str(artifact.model),
            expected=f"at most {REFUSED}, with and without {', '.join(entries)}",
            hint=HINT,
        )
    return found


def _difference(found: OnnxSession, wanted: OnnxSession) -> float | None:
    inputs = [Wanted(port.name, port.shape, port.dtype) for port in wanted.inputs]
    batch = next((each.shape[0] for each in inputs if each.shape and each.shape[0] is not None), 1)
    try:
        feeds = make_inputs(inputs, batch=batch, seed=0)
        outputs = wanted.run(feeds)
        return max((output_error(found.run(feeds)[name], value) for name, value in outputs.items()), default=0.0)
    except BadInput:
        return None
