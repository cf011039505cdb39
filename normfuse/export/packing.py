"""Codes of at most four bits take four bits in the file."""

from __future__ import annotations

from typing import Final

import ml_dtypes
import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

__all__ = ["is_packed", "pack_small_codes"]

FEWEST: Final = 64
"""Constants of fewer elements save less than the node in front of them costs."""

SMALLEST, LARGEST = -8, 7


def is_packed(codes: Tensor) -> bool:
    """Return whether the file holds this constant with four bits per element."""
    is_large = codes.dtype is torch.int8 and codes.numel() >= FEWEST
    return is_large and int(codes.min()) >= SMALLEST and int(codes.max()) <= LARGEST


def pack_small_codes(model: ir.Model) -> int:
    """Hold int8 constants whose values fit int4 as int4, with a cast in front of who reads them; return how many.

    Two values share a byte. onnxruntime computes the cast once, when it loads the file, so its integer kernels run as
    they do for 8 bits (DequantizeLinear of int4 has none).
    """
    packed = 0
    for value in list(model.graph.initializers.values()):
        if (codes := _small_codes(value)) is not None:
            _pack(model.graph, value, codes)
            packed += 1
    return packed


def _small_codes(value: ir.Value) -> np.ndarray[tuple[int, ...], np.dtype[np.int8]] | None:
    if value.const_value is None or value.dtype != ir.DataType.INT8 or value.is_graph_output():
        return None
    codes = value.const_value.numpy()
    return codes if is_packed(torch.from_numpy(codes.copy())) else None


def _pack(graph: ir.Graph, value: ir.Value, codes: np.ndarray[tuple[int, ...], np.dtype[np.int8]]) -> None:
    name = value.name
    assert name is not None
    small = ir.Value(
        name=name,
        shape=value.shape,
        type=ir.TensorType(ir.DataType.INT4),
        const_value=ir.tensor(codes.astype(ml_dtypes.int4), dtype=ir.DataType.INT4, name=name),
    )
    cast = ir.node("Cast", [small], attributes={"to": int(ir.DataType.INT8)}, name=f"{name}/Cast")
    (wide,) = cast.outputs
    wide.name, wide.shape, wide.type = f"{name}_int8", value.shape, value.type
    for use in list(value.uses()):
        use.node.replace_input_with(use.idx, wide)
    del graph.initializers[name]
    graph.register_initializer(small)
    graph.insert_before(graph[0], cast)
