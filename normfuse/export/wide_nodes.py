"""Which nodes of an ONNX file stay in float32 beside a narrower type, and why; and how floats are read in it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any, Final

import onnx_ir as ir

from normfuse.export.narrow_numbers import Numbers

__all__ = [
    "FLOATS",
    "MOVES",
    "branches",
    "captured_by",
    "computes_floats",
    "ends_floats",
    "is_dequantized",
    "is_float",
    "reason_to_stay",
    "scale_of",
    "unfit",
    "whole_numbers",
]

HEADROOM: Final = 4.0
"""How far below the largest number a tensor must have stayed: samples do not say what else will come."""

WIDE: Final = frozenset(
    {
        *("LayerNormalization", "RMSNormalization", "GroupNormalization", "InstanceNormalization"),
        *("LpNormalization", "MeanVarianceNormalization", "BatchNormalization"),
        *("ReduceMean", "ReduceSum", "ReduceSumSquare", "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp"),
        *("Softmax", "LogSoftmax", "Exp", "Log", "Pow", "CumSum", "Softplus", "Sqrt", "Reciprocal"),
    }
)
"""Sums of many terms, and functions whose arguments or values grow out of a narrow type."""

MOVES: Final = frozenset(
    {
        *("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Identity", "Slice", "Split", "Expand", "Gather"),
        *("Tile", "DepthToSpace", "SpaceToDepth", "Relu", "MaxPool", "Neg", "Abs"),
    }
)
"""What computes no new numbers stays in the type of what it reads."""

ARITHMETIC: Final = frozenset(
    {"Add", "Sub", "Mul", "Div", "Mod", "Floor", "Ceil", "Round", "Min", "Max", "Clip", "Where"}
)
"""What positions are computed by from others."""

INTEGERS: Final = frozenset(
    {ir.DataType.INT16, ir.DataType.INT32, ir.DataType.INT64}
    | {ir.DataType.UINT16, ir.DataType.UINT32, ir.DataType.UINT64}
)
"""Those that narrow types do not hold; of eight bits they hold all."""

FLOATS: Final = frozenset({ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16})


def computes_floats(node: ir.Node) -> bool:
    """Return whether a node computes with floats, and neither moves them nor makes codes or other numbers of them."""
    if node.op_type in MOVES or node.op_type in ("QuantizeLinear", "DequantizeLinear") or ends_floats(node):
        return False
    return any(is_float(value) for value in (*node.inputs, *node.outputs))


def whole_numbers(graph: ir.Graph, numbers: Numbers, largest: Mapping[str, float]) -> dict[ir.Value, float]:
    """Return the tensors that are computed of more integers than a type counts, and how large these were (ours).

    Positions and counts, of which rounding makes others; up to the first operator that is no arithmetic.
    """
    found = dict[ir.Value, float]()
    for node in graph:
        read = [found[value] for value in node.inputs if value in found]
        if node.op_type == "Cast" and _dtype(node.inputs[0]) in INTEGERS:
            seen = largest.get(node.outputs[0].name or "", 0.0)
            read = [seen] if seen > numbers.largest_counted / HEADROOM else []
        if read and node.op_type in ARITHMETIC | MOVES | {"Cast"}:
            found |= {value: max(read) for value in node.outputs if value.dtype is ir.DataType.FLOAT}
    return found


def reason_to_stay(
    node: ir.Node,
    numbers: Numbers,
    largest: Mapping[str, float],
    whole: Mapping[ir.Value, float],
    captured: Collection[ir.Value],
) -> str | None:
    """Return why a node computes in float32; empty where its operator always does, None where it does not (ours).

    Args:
        node: one that computes with floats.
        numbers: the type that it would compute in.
        largest: the largest magnitude of every float tensor by its name; others are trusted.
        whole: as ``whole_numbers`` finds them.
        captured: what branches of the file read from outside of them.
    """
    if node.op_type in WIDE or _divides(node):
        return ""
    if node.domain or branches(node) or any(value in captured for value in node.outputs):
        return "it is no standard operator outside of branches"
    for value in (*node.inputs, *node.outputs):
        if value is None or value.dtype is not ir.DataType.FLOAT or value.const_value is not None:
            continue
        seen = largest.get(value.name or "", 0.0)
        if seen > numbers.largest / HEADROOM:
            return f"values up to {seen:.3g}"
        if 0 < seen < numbers.smallest_scale:
            return f"values of at most {seen:.3g}"
        if value in whole:
            return f"of whole numbers up to {whole[value]:.3g}"
    return next((told for value in node.inputs if value is not None and (told := unfit(value, numbers))), None)


def unfit(value: ir.Value, numbers: Numbers) -> str:
    """Return what the type does not hold of a constant or of the scale of codes, moved or not; empty: nothing."""
    source = _unmoved(value)
    if source.const_value is not None:
        return numbers.unfit(source.const_value.numpy()) if is_float(source) else ""
    made = source.producer()
    is_dequantizer = made is not None and made.op_type == "DequantizeLinear"
    return numbers.unfit_scale(scale_of(made)) if is_dequantizer and made is not None else ""


def is_float(value: ir.Value | None) -> bool:
    """Return whether a tensor, if there is one, is of floats."""
    return _dtype(value) in FLOATS


def _dtype(value: ir.Value | None) -> ir.DataType | None:
    if value is None:
        return None
    return value.dtype if value.const_value is None else value.const_value.dtype


def ends_floats(node: ir.Node) -> bool:
    """Return whether a node only makes numbers of another sort of floats."""
    return node.op_type == "Cast" and is_float(node.inputs[0])


def is_dequantized(value: ir.Value) -> bool:
    """Return whether a tensor is the values of codes."""
    made = value.producer()
    return made is not None and made.op_type == "DequantizeLinear"


def scale_of(quantizer: ir.Node) -> Any:
    """Return the numbers of a quantizer's scale."""
    scale = quantizer.inputs[1]
    assert scale is not None
    assert scale.const_value is not None
    return scale.const_value.numpy()


def captured_by(node: ir.Node) -> list[ir.Value]:
    """Return the tensors from outside that the branches of a node read."""
    inner = branches(node)
    read = [value for graph in inner for each in graph.all_nodes() for value in each.inputs if value is not None]
    return [value for value in read if value.graph is node.graph]


def branches(node: ir.Node) -> list[ir.Graph]:
    """Return the graphs inside a node, If's and Loop's."""
    return [each for attribute in node.attributes.values() for each in _graphs(attribute)]


def _graphs(attribute: ir.Attr) -> Iterator[ir.Graph]:
    if attribute.type is ir.AttributeType.GRAPH:
        yield attribute.as_graph()
    elif attribute.type is ir.AttributeType.GRAPHS:
        yield from attribute.as_graphs()


def _divides(node: ir.Node) -> bool:
    """Return whether a node divides by what is computed: a guard against zero may be too small for the type."""
    return node.op_type == "Div" and is_float(node.inputs[1]) and _unmoved(node.inputs[1]).const_value is None  # type: ignore[arg-type]


def _unmoved(value: ir.Value) -> ir.Value:
    """Return a tensor before it was moved."""
    while (made := value.producer()) is not None and made.op_type in MOVES and made.inputs[0] is not None:
        value = made.inputs[0]
    return value
