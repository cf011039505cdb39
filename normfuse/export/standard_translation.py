"""How products of floats and constant codes are written for builders that know standard operators alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import onnx_ir as ir
from onnxscript import opset21 as op

from normfuse.kernels.ops import GROUPED_LINEAR, UNPACK

__all__ = ["pack_blocks", "standard_translations"]


def standard_translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """Return what takes the place of onnxruntime's own operators in the exporter's table."""
    return {GROUPED_LINEAR: _grouped_linear, UNPACK: _unpack}


def pack_blocks(model: ir.Model) -> None:
    """Hold the codes of weights that have blocks as int4, two to a byte: the first in the low nibble."""
    for node in model.graph:
        if node.op_type == "DequantizeLinear" and "block_size" in node.attributes:
            codes = node.inputs[0]
            assert codes is not None
            assert codes.const_value is not None
            packed = codes.const_value.numpy().astype(ml_dtypes.int4)
            codes.const_value = ir.tensor(packed, dtype=ir.DataType.INT4, name=codes.name)
            codes.type = ir.TensorType(ir.DataType.INT4)


def _grouped_linear(  # noqa: PLR0913, PLR0917 - as the operator
    x: Any, codes: Any, scale: Any, zero_point: Any, bias: Any, size: int, rounds: bool
) -> Any:
    """Write a product with values of blocked codes, [out, in] as PyTorch holds them."""
    if zero_point is not None or rounds:
        raise NotImplementedError("blocks with zero points, or activations rounded in every row")
    values: Any = op.DequantizeLinear(codes, scale, axis=1, block_size=size)
    product: Any = op.MatMul(x, op.Transpose(values, perm=[1, 0]))
    return product if bias is None else op.Add(product, bias)


def _unpack(codes: Any, scale: Any) -> Any:
    """Write the values of codes with a scale per output channel."""
    return op.DequantizeLinear(codes, scale, axis=0)
