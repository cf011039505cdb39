"""How ``torch.ops.normfuse`` quantizers become ONNX QuantizeLinear and DequantizeLinear."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from onnxscript import opset21 as op
from onnxscript.ir import DataType

from normfuse.kernels.ops import DEQUANTIZE, QUANTIZE

__all__ = ["translation_table"]

PER_TENSOR_AXIS = 1
"""ONNX ignores the axis of a scalar scale."""


def translation_table() -> dict[Any, Callable[..., Any]]:
    """Return the ``custom_translation_table`` for ``torch.onnx.export``."""
    return {QUANTIZE: _quantize, DEQUANTIZE: _dequantize}


def _quantize(x: Any, scale: Any, zero_point: Any, axis: int, minimum: int, maximum: int) -> Any:
    kind = DataType.INT8 if minimum < 0 else DataType.UINT8
    zero = op.Cast(zero_point, to=int(kind))
    return op.QuantizeLinear(x, scale, zero, axis=axis if axis >= 0 else PER_TENSOR_AXIS)


def _dequantize(codes: Any, scale: Any, zero_point: Any, axis: int) -> Any:
    zero = op.CastLike(zero_point, codes)
    return op.DequantizeLinear(codes, scale, zero, axis=axis if axis >= 0 else PER_TENSOR_AXIS)
