"""Reads an ONNX model as the rules need it: nodes by operator, constants, quantizers and what they stand on."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Final

import onnx_ir as ir

__all__ = [
    "FLOATS",
    "STANDARD",
    "block_size",
    "code_type",
    "constant",
    "input_of",
    "is_of_weights",
    "maker",
    "nodes",
    "quantizers",
    "scales",
    "unmoved",
]

STANDARD: Final = ("", "ai.onnx")

FLOATS: Final = frozenset({ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16})

MOVES: Final = frozenset({"Transpose", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity"})


def nodes(model: ir.Model, *names: str) -> Iterator[ir.Node]:
    """Yield the nodes of these standard operators, those in branches and loops too."""
    for node in model.graph.all_nodes():
        if node.domain in STANDARD and node.op_type in names:
            yield node


def quantizers(model: ir.Model) -> Iterator[ir.Node]:
    """Yield all nodes between floats and codes, in both directions."""
    return nodes(model, "QuantizeLinear", "DequantizeLinear")


def input_of(node: ir.Node, index: int) -> ir.Value | None:
    """Return an input, None where it is left out."""
    return node.inputs[index] if index < len(node.inputs) else None


def constant(value: ir.Value | None) -> ir.TensorProtocol | None:
    """Return a constant's numbers; None of what is computed."""
    return None if value is None else value.const_value


def maker(value: ir.Value | None) -> ir.Node | None:
    """Return the node that makes a tensor, before it was moved."""
    source = unmoved(value)
    return None if source is None else source.producer()


def is_of_weights(node: ir.Node) -> bool:
    """Return whether a quantizer or dequantizer stands on constants."""
    source = unmoved(node.inputs[0])
    while source is not None and (made := source.producer()) is not None and made.op_type == "QuantizeLinear":
        source = unmoved(made.inputs[0])
    return constant(source) is not None


def scales(node: ir.Node) -> int:
    """Return how many scales a quantizer has, as far as the file says it."""
    scale = input_of(node, 1)
    shape = None if scale is None else scale.shape
    return 1 if shape is None else math.prod(size for size in shape if isinstance(size, int))


def block_size(node: ir.Node) -> int:
    """Return how many neighbours share a scale; 0 where there are no blocks."""
    found = node.attributes.get("block_size")
    return 0 if found is None else found.as_int()


def code_type(node: ir.Node) -> ir.DataType | None:
    """Return the type of a quantizer's codes; None where the file leaves it to the reader."""
    if node.op_type == "DequantizeLinear":
        codes = node.inputs[0]
        return None if codes is None else codes.dtype
    if (zero := input_of(node, 2)) is not None:
        return zero.dtype
    named = node.attributes.get("output_dtype")
    return ir.DataType(named.as_int()) if named is not None and named.as_int() else None


def unmoved(value: ir.Value | None) -> ir.Value | None:
    """Return a tensor before it was moved."""
    while value is not None and (made := value.producer()) is not None and made.op_type in MOVES:
        value = made.inputs[0]
    return value
