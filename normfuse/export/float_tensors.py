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
    """Return the names of the float tensors that an ONNX file computes with, in its order.

    Functions and branches are looked into. Inputs that QuantizeLinear alone reads are left out, outputs that
    DequantizeLinear writes (twice, where the model returns a tensor twice), and the scales of both: what lies between
    is empty in an integer network. A tensor whose type cannot be inferred counts as float.
    """
    model = shape_inference.infer_shapes(inliner.inline_local_functions(onnx.load(path)), data_prop=False)
    graph = model.graph
    graphs = [graph, *(branch for node in graph.node for branch in _branches(node))]
    read = {name for node in graph.node for name in _read(node)}
    allowed = {*_at_the_ends(graph), *(value.name for value in graph.input if value.name not in read)}
    found = [name for each in graphs for name, kind in _types(each).items() if kind in {0, *FLOATS}]
    return [name for name in dict.fromkeys(found) if name not in allowed]


def _types(graph: onnx.GraphProto) -> dict[str, int]:
    """Return the type of every tensor that a graph is given or makes, in its order; 0 where it is not known."""
    values = (*graph.input, *graph.value_info, *graph.output)
    known = {value.name: value.type.tensor_type.elem_type for value in values}
    known |= {tensor.name: tensor.data_type for tensor in graph.initializer}
    given = [value.name for value in graph.input] + [tensor.name for tensor in graph.initializer]
    made = [name for node in graph.node for name in node.output if name]
    return {name: known.get(name, 0) for name in (*given, *made)}


def _branches(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    """Yield the graphs inside a node, If's and Loop's, and those inside them."""
    for attribute in node.attribute:
        for branch in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
            yield branch
            for inner in branch.node:
                yield from _branches(inner)


def _read(node: onnx.NodeProto) -> set[str]:
    """Return the tensors that a node reads, its branches too."""
    inner = (name for branch in _branches(node) for each in branch.node for name in each.input)
    given_back = (value.name for branch in _branches(node) for value in branch.output)
    return {*node.input, *inner, *given_back}


def _at_the_ends(graph: onnx.GraphProto) -> Iterator[str]:
    inputs, outputs = {value.name for value in graph.input}, {value.name for value in graph.output}
    for node in graph.node:
        if node.op_type == "QuantizeLinear" and node.input[0] in inputs:
            if all(node.input[0] not in _read(other) or _reads_shape(other) for other in graph.node if other != node):
                yield node.input[0]
            yield node.input[1]
        elif node.op_type == "DequantizeLinear":
            copies = [each for each in graph.node if node.output[0] in _read(each)]
            if all(each.op_type == "Identity" and each.output[0] in outputs for each in copies):
                yield from (node.output[0], node.input[1], *(each.output[0] for each in copies))


def _reads_shape(node: onnx.NodeProto) -> bool:
    return node.op_type in ("Shape", "Size")
