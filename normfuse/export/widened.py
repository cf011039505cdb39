"""A file in a narrow type of floats as one in float32, for runtimes that have no kernels for the type.

Onnxruntime's CPU has none for bfloat16, and computes float16 in float32 where it can (1.31.1), so it shows neither what
such an engine rounds nor where it overflows. With ``rounds`` the float32 file does.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from normfuse.export.narrow_numbers import NUMBERS, Numbers
from normfuse.quant.target import BodyType

__all__ = ["is_bfloat16", "write_widened"]

TYPES: Final = {numbers.onnx: numbers for numbers in NUMBERS.values()}

EXACT: Final = frozenset({"Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Identity", "Slice", "Gather"})
"""What hands rounded numbers on."""

FLOAT32_BITS: Final = 24


def is_bfloat16(path: Path) -> bool:
    """Return whether floats of a file are bfloat16."""
    graph = ir.load(path).graph
    constants = (value.dtype for value in graph.initializers.values())
    casts = (node.attributes["to"].as_int() for node in graph if node.op_type == "Cast")
    return NUMBERS[BodyType.BF16].onnx in {*constants, *casts}


def write_widened(typed: Path, path: Path, *, rounds: bool = False) -> None:
    """Write a copy of a typed file that computes in float32: constants keep their rounded values (ours).

    With ``rounds``, every result that the typed file has in a narrow type is rounded to it, half to even, with its
    overflow and its subnormal numbers: ``c x - (c x - x)`` with ``c = 2^s + 1`` keeps all bits of x but the last s
    (Veltkamp 1968; Dekker 1971, section 5). Sums inside an operator stay float32, as in an engine's kernels.
    """
    model = ir.load(typed)
    ShapeInferencePass(data_prop=False)(model)
    for value in model.graph.initializers.values():
        if value.const_value is not None and value.const_value.dtype in TYPES:
            value.const_value = ir.tensor(value.const_value.numpy().astype(np.float32), name=value.name)
            value.type = ir.TensorType(ir.DataType.FLOAT)
    for node in list(model.graph):
        if node.op_type == "Cast" and node.attributes["to"].as_int() in TYPES:
            node.attributes["to"] = ir.AttrInt64("to", int(ir.DataType.FLOAT))
        for value in node.outputs:
            numbers = TYPES.get(value.dtype) if value.dtype is not None else None
            if numbers is None:
                continue
            value.type = ir.TensorType(ir.DataType.FLOAT)
            if rounds and node.op_type not in EXACT:
                _round(model.graph, node, value, numbers)
    ir.save(model, path, external_data=f"{path.name}.data")


def _round(graph: ir.Graph, behind: ir.Node, value: ir.Value, numbers: Numbers) -> None:
    """Let those who read a tensor read it rounded."""
    made = list[ir.Node]()

    def call(operator: str, *inputs: ir.Value) -> ir.Value:
        kind = ir.DataType.BOOL if operator in ("Greater", "Less") else ir.DataType.FLOAT
        node = ir.node(operator, list(inputs))
        node.outputs[0].name = f"{value.name}_rounded_{len(made)}"
        node.outputs[0].type = ir.TensorType(kind)
        made.append(node)
        return node.outputs[0]

    def number(name: str, of: float) -> ir.Value:
        return _number(graph, f"normfuse_{name}_{numbers.numpy.name}", of)

    lost = FLOAT32_BITS - numbers.bits
    scaled = call("Mul", value, number("splitter", 2.0**lost + 1))
    near = call("Sub", scaled, call("Sub", scaled, value))
    size = call("Abs", value)
    if numbers.smallest_step > 2.0**-126:  # of fewer exponents than float32: its subnormal numbers are fixed steps
        shift = number("shift", 1.5 * 2.0 ** (FLOAT32_BITS - 1) * numbers.smallest_step)
        steps = call("Sub", call("Add", value, shift), shift)
        near = call("Where", call("Less", size, number("normal", numbers.smallest)), steps, near)
    infinite = call("Mul", value, number("infinity", float("inf")))
    rounded = call("Where", call("Greater", size, number("limit", numbers.limit)), infinite, near)
    readers = [use for use in value.uses() if use.node not in made]
    for use in readers:
        use.node.replace_input_with(use.idx, rounded)
    graph.insert_after(behind, made)


def _number(graph: ir.Graph, name: str, of: Any) -> ir.Value:
    if name not in graph.initializers:
        const = ir.tensor(np.array(of, dtype=np.float32), name=name)
        value = ir.Value(name=name, shape=ir.Shape([]), type=ir.TensorType(ir.DataType.FLOAT), const_value=const)
        graph.register_initializer(value)
    return graph.initializers[name]
