"""Which tensors of an ONNX file are float, between the quantizers of its inputs and its outputs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final

import onnx
from onnx import inliner, shape_inference

__all__ = ["float_tensors"]

FLOATS: Final = frozenset(
    {
        *(onnx.TensorProto.FLOAT, onnx.TensorProto.DOUBLE, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16),
        *(onnx.TensorProto.FLOAT8E4M3FN, onnx.TensorProto.FLOAT8E5M2),
    }
)


def float_tensors(path: Path) -> list[str]:
    """Return the names of the float tensors that an ONNX file computes with, in its order; functions are looked into.

    Inputs that QuantizeLinear alone reads are left out, outputs that DequantizeLinear writes (twice, where the
    model returns a tensor twice), and the scales of both:
    what lies between is empty in an integer network. A tensor whose type cannot be inferred counts as float.
    """
    model = shape_inference.infer_shapes(inliner.inline_local_functions(onnx.load(path)), data_prop=False)
    graph = model.graph
    types = {value.name: value.type.tensor_type.elem_type for value in (*graph.input, *graph.value_info, *graph.output)}
    types |= {tensor.name: tensor.data_type for tensor in graph.initializer}
    read = {name for node in graph.node for name in node.input}
    allowed = {*_at_the_ends(graph), *(value.name for value in graph.input if value.name not in read)}
    return [name for name in _names(graph) if name not in allowed and types.get(name, 0) in {0, *FLOATS}]


def _at_the_ends(graph: onnx.GraphProto) -> Iterator[str]:
    inputs, outputs = {value.name for value in graph.input}, {value.name for value in graph.output}
    for node in graph.node:
        if node.op_type == "QuantizeLinear" and node.input[0] in inputs:
            if all(node.input[0] not in other.input or _reads_shape(other) for other in graph.node if other != node):
                yield node.input[0]
            yield node.input[1]
        elif node.op_type == "DequantizeLinear":
            copies = [each for each in graph.node if node.output[0] in each.input]
            if all(each.op_type == "Identity" and each.output[0] in outputs for each in copies):
                yield from (node.output[0], node.input[1], *(each.output[0] for each in copies))


def _reads_shape(node: onnx.NodeProto) -> bool:
    return node.op_type in ("Shape", "Size")


def _names(graph: onnx.GraphProto) -> list[str]:
    given = [value.name for value in graph.input] + [tensor.name for tensor in graph.initializer]
    return list(dict.fromkeys([*given, *(name for node in graph.node for name in node.output if name)]))
