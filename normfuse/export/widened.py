"""A file in bfloat16 with its floats widened again, for runtimes that have no kernels for them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir

__all__ = ["is_bfloat16", "write_widened"]


def is_bfloat16(path: Path) -> bool:
    """Return whether floats of a file are bfloat16."""
    return any(value.dtype is ir.DataType.BFLOAT16 for value in ir.load(path).graph.initializers.values())


def write_widened(typed: Path, path: Path) -> None:
    """Write a copy of a bfloat16 file that computes in float32: constants keep their rounded values (ours)."""
    model = ir.load(typed)
    for value in model.graph.initializers.values():
        if value.const_value is not None and value.const_value.dtype is ir.DataType.BFLOAT16:
            value.const_value = ir.tensor(value.const_value.numpy().astype(np.float32), name=value.name)
    for node in model.graph:
        if node.op_type == "Cast" and node.attributes["to"].as_int() == ir.DataType.BFLOAT16:
            node.attributes["to"] = ir.AttrInt64("to", int(ir.DataType.FLOAT))
        for value in node.outputs:
            if value.dtype is ir.DataType.BFLOAT16:
                value.type = ir.TensorType(ir.DataType.FLOAT)
    ir.save(model, path, external_data=f"{path.name}.data")
