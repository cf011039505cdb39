"""Small ONNX files of float32, written as text with constants beside it, and what became of their tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import ml_dtypes
import numpy as np
import onnx
import onnx.parser
from onnx import TensorProto as T
from onnx import numpy_helper

from normfuse.runtime.onnx_session import AS_WRITTEN, open_onnx

__all__ = ["LAYER", "floats", "outcome", "sample", "types_of", "written"]

LAYER: Final = "normfuse.layer"


def sample(*shape: int, seed: int = 0, size: float = 1.0) -> Any:
    return (np.random.default_rng([seed, *shape]).standard_normal(shape) * size).astype(np.float32)


def floats(values: Any) -> Any:
    return np.asarray(values, dtype=np.float32)


def written(path: Path, text: str, *, opset: int = 21, **constants: Any) -> Path:
    """Write a file of a graph's text, ``g (float[n,5] x) => (float[n,3] y) { y = MatMul (x, w) }``.

    Nodes are called after what they make and their operator, ``y/MatMul``, and belong to the layer ``layers.y``.
    """
    model = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": {opset}]>\n{text}')
    for node in model.graph.node:
        node.name = f"{node.output[0]}/{node.op_type}"
        node.metadata_props.add(key=LAYER, value=f"layers.{node.output[0]}")
    for name, values in constants.items():
        model.graph.initializer.append(_tensor(name, np.asarray(values)))
    model = onnx.shape_inference.infer_shapes(model, strict_mode=True)
    del model.graph.value_info[:]
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)
    return path


def _tensor(name: str, values: Any) -> onnx.TensorProto:
    if values.dtype in (ml_dtypes.float8_e4m3fn, ml_dtypes.int4):
        kind = T.INT4 if values.dtype == ml_dtypes.int4 else T.FLOAT8E4M3FN
        return onnx.helper.make_tensor(name, kind, values.shape, values.astype(np.float32).flatten().tolist())
    return numpy_helper.from_array(values, name)


def types_of(path: Path) -> dict[str, int]:
    """Return the element type of every tensor of a file's main graph, as strict inference finds it."""
    model = onnx.shape_inference.infer_shapes(onnx.load(path), check_type=True, strict_mode=True, data_prop=True)
    graph = model.graph
    values = (*graph.value_info, *graph.input, *graph.output)
    found = {value.name: value.type.tensor_type.elem_type for value in values}
    return found | {tensor.name: tensor.data_type for tensor in graph.initializer}


def outcome(path: Path, **inputs: Any) -> dict[str, Any]:
    return open_onnx(path, threads=1, session_config=AS_WRITTEN).run(inputs)
