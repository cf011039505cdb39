"""A file in a narrow type of floats as one in float32, for runtimes that have no kernels for the type.

Onnxruntime's CPU has none for bfloat16, and computes float16 in float32 where it can (1.31.1), so it shows neither what
such an engine rounds nor where it overflows. With ``rounds`` the float32 file does.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from normfuse.export.narrow_numbers import NUMBERS
from normfuse.quant.target import BodyType

__all__ = ["is_bfloat16", "write_widened"]

TYPES: Final = frozenset(numbers.onnx for numbers in NUMBERS.values())

EXACT: Final = frozenset({"Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Identity", "Slice", "Gather"})
"""What hands rounded numbers on."""


def is_bfloat16(path: Path) -> bool:
    """Return whether floats of a file are bfloat16; of what is no ONNX file they are not."""
    try:
        graph = ir.load(path).graph
    except Exception:  # noqa: BLE001 - protobuf and onnx_ir have errors of their own for what is no model
        return False
    constants = (value.dtype for value in graph.initializers.values())
    casts = (node.attributes["to"].as_int() for node in graph if node.op_type == "Cast" and "to" in node.attributes)
    return NUMBERS[BodyType.BF16].onnx in {*constants, *casts}


def write_widened(typed: Path, path: Path, *, rounds: bool = False) -> None:
    """Write a copy of a typed file that computes in float32: constants keep their rounded values (ours).

    With ``rounds``, every result that the typed file has in a narrow type is rounded to it, by a Cast to the type and
    one back: onnxruntime computes these as they are between operators of float32. Sums inside an operator stay float32.
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
            narrow = value.dtype
            if narrow not in TYPES:
                continue
            value.type = ir.TensorType(ir.DataType.FLOAT)
            if rounds and node.op_type not in EXACT:
                _round(model.graph, node, value, narrow)
    ir.save(model, path, external_data=f"{path.name}.data")


def _round(graph: ir.Graph, behind: ir.Node, value: ir.Value, narrow: ir.DataType) -> None:
    """Let those who read a tensor read it rounded."""
    casts = list[ir.Node]()
    rounded = value
    for name, dtype in (("narrow", narrow), ("rounded", ir.DataType.FLOAT)):
        cast = ir.node("Cast", [rounded], attributes={"to": int(dtype)})
        rounded = cast.outputs[0]
        rounded.name, rounded.type = f"{value.name}_{name}", ir.TensorType(dtype)
        casts.append(cast)
    for use in list(value.uses()):
        if use.node not in casts:
            use.node.replace_input_with(use.idx, rounded)
    graph.insert_after(behind, casts)
