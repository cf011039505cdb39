"""How large the floats of an ONNX file become on samples, tensor by tensor."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from normfuse.runtime.onnx_session import open_onnx

__all__ = ["largest_values"]

PREFIX: Final = "normfuse_largest_"


def largest_values(path: Path, samples: Iterable[Mapping[str, Any]], *, threads: int = 1) -> dict[str, float]:
    """Return the largest magnitude of every float32 tensor that an ONNX file computes, by the tensor's name (ours).

    Each tensor gets the maximum of its magnitudes as an output more, so nothing but single numbers is kept.

    Args:
        path: the file.
        samples: the arrays of every input, by name.
        threads: onnxruntime's.
    """
    model = ir.load(path)
    ShapeInferencePass(data_prop=False)(model)
    watched = dict[str, str]()
    for value in [*model.graph.inputs, *(value for node in model.graph for value in node.outputs)]:
        if value.dtype is ir.DataType.FLOAT and value.name:
            watched[f"{PREFIX}{len(watched)}"] = value.name
            _watch(model.graph, value, list(watched)[-1])
    found = dict.fromkeys(watched.values(), 0.0)
    with tempfile.TemporaryDirectory(prefix="normfuse-") as folder:
        opened = Path(folder) / "watched.onnx"
        ir.save(model, opened, external_data=f"{opened.name}.data")
        # Of quantizers it shall compute what the file says, and in float (it has no products of 8-bit floats).
        session = open_onnx(opened, threads=threads, session_config={"session.disable_quant_qdq": "1"})
        for sample in samples:
            outputs = session.run(dict(sample))
            for name, tensor in watched.items():
                found[tensor] = float(np.fmax(found[tensor], outputs[name]))
    return found


def _watch(graph: ir.Graph, value: ir.Value, name: str) -> None:
    size = ir.node("Abs", [value])
    most = ir.node("ReduceMax", [size.outputs[0]], attributes={"keepdims": 0})
    size.outputs[0].name, most.outputs[0].name = f"{name}_of", name
    most.outputs[0].type, most.outputs[0].shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape([])
    graph.extend([size, most])
    graph.outputs.append(most.outputs[0])
