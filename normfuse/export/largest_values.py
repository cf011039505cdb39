"""How large the floats of an ONNX file become on samples, tensor by tensor."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from normfuse.runtime.onnx_session import AS_WRITTEN, open_onnx

__all__ = ["largest_values"]

PREFIX: Final = "normfuse_largest_"

MOST: Final = float(np.finfo(np.float32).max)


def largest_values(path: Path, samples: Iterable[Mapping[str, Any]], *, threads: int = 1) -> dict[str, float]:
    """Return the largest finite magnitude of every float32 tensor of an ONNX file, by the tensor's name (ours).

    Each tensor gets the maximum of its magnitudes as an output more, so nothing but single numbers is kept. Infinities
    (of masks) and what is not a number have none, since every type of floats holds them, and hide no other; a tensor
    without elements, or of no sample, has 0. Constants are not watched.

    Args:
        path: the file.
        samples: the arrays of every input, by name.
        threads: onnxruntime's.
    """
    model = ir.load(path)
    ShapeInferencePass(data_prop=False)(model)
    watched = dict[str, str]()
    bounds = [_constant(model.graph, f"{PREFIX}{name}", size) for name, size in (("zero", 0.0), ("most", MOST))]
    for value in [*model.graph.inputs, *(value for node in model.graph for value in node.outputs)]:
        if value.dtype is ir.DataType.FLOAT and value.name:
            name = f"{PREFIX}{len(watched)}"
            watched[name] = value.name
            _watch(model.graph, value, name, *bounds)
    found = dict.fromkeys(watched.values(), 0.0)
    with tempfile.TemporaryDirectory(prefix="normfuse-") as folder:
        opened = Path(folder) / "watched.onnx"
        ir.save(model, opened, external_data=f"{opened.name}.data")
        session = open_onnx(opened, threads=threads, session_config=AS_WRITTEN)
        for sample in samples:
            outputs = session.run(dict(sample))
            for name, tensor in watched.items():
                found[tensor] = float(np.fmax(found[tensor], outputs[name]))
    return found


def _constant(graph: ir.Graph, name: str, number: float) -> ir.Value:
    const = ir.tensor(np.float32(number), name=name)
    value = ir.Value(name=name, shape=ir.Shape([]), type=ir.TensorType(ir.DataType.FLOAT), const_value=const)
    graph.register_initializer(value)
    return value


def _watch(graph: ir.Graph, value: ir.Value, name: str, zero: ir.Value, most: ir.Value) -> None:
    size = ir.node("Abs", [value])
    is_finite = ir.node("LessOrEqual", [size.outputs[0], most])
    finite = ir.node("Where", [is_finite.outputs[0], size.outputs[0], zero])
    largest = ir.node("ReduceMax", [finite.outputs[0]], attributes={"keepdims": 0})
    for node, role in ((size, "size"), (is_finite, "is_finite"), (finite, "finite")):
        node.outputs[0].name = f"{name}_{role}"
    made = largest.outputs[0]
    made.name, made.type, made.shape = name, ir.TensorType(ir.DataType.FLOAT), ir.Shape([])
    graph.extend([size, is_finite, finite, largest])
    graph.outputs.append(made)
