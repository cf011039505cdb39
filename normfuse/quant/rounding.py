"""Quantize and dequantize, the one place where rounding and saturation are written.

The rules are those of ONNX QuantizeLinear and DequantizeLinear as onnxruntime computes them, so that a simulation and
an engine agree bit for bit:

    code = saturate(round_half_to_even(x / scale) + zero_point)      the quotient rounded in x's own type
    real = (code - zero_point) * scale                               an integer difference, the product in scale's type
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from normfuse.errors import UsageError
from normfuse.quant.integer_type import smallest_container
from normfuse.quant.parameters import QuantParams

__all__ = ["dequantize", "dequantize_tensor", "quantize", "quantize_dequantize", "quantize_tensor"]

EXACT_IN_FLOAT32: Final = 1 << 24
"""Integers up to here are exact in float32, so shorter code ranges saturate without widening."""


def quantize(x: Tensor, params: QuantParams) -> Tensor:
    """Return the codes of ``x``, of its shape, in ``params.type.torch_dtype``; NaN has no code, any may come back."""
    scale, zero_point = _beside(x, params)
    kind = params.type
    return quantize_tensor(x, scale, zero_point, params.granularity.operator_axis, kind.minimum, kind.maximum)


def dequantize(codes: Tensor, params: QuantParams) -> Tensor:
    """Return the float32 values that ``codes`` stand for."""
    scale, zero_point = params.scale.to(codes.device), params.zero_point.to(codes.device)
    return dequantize_tensor(codes, scale, zero_point, params.granularity.operator_axis)


def quantize_dequantize(x: Tensor, params: QuantParams) -> Tensor:
    """Return ``x`` moved to the nearest value that has a code, in x's shape and type."""
    scale, zero_point = _beside(x, params)
    axis, kind = params.granularity.operator_axis, params.type
    codes = quantize_tensor(x, scale, zero_point, axis, kind.minimum, kind.maximum)
    return dequantize_tensor(codes, scale, zero_point, axis)


def quantize_tensor(x: Tensor, scale: Tensor, zero_point: Tensor, axis: int, minimum: int, maximum: int) -> Tensor:
    """Return the codes of ``x``, saturated to ``minimum ... maximum``.

    Args:
        x: float32 or float64, any shape.
        scale: x's type and device, positive; shape [] with axis -1, else [x.shape[axis]].
        zero_point: any integer type, the scale's shape.
        axis: the channel axis, or -1 for one scale per tensor.
        minimum: the smallest code.
        maximum: the largest code.

    Raises:
        UsageError: types or shapes do not fit.
    """
    _check(x, scale, zero_point, axis)
    if x.dtype != scale.dtype or x.dtype not in (torch.float32, torch.float64):
        raise UsageError(f"quantize {x.dtype} by a scale of {scale.dtype}", expected="both float32 or both float64")
    # A true division by a tensor on x's own device: by a CPU scalar, CUDA would multiply with the reciprocal.
    steps = torch.round(x / _along(scale, axis, x.ndim))
    if maximum - minimum >= EXACT_IN_FLOAT32:
        steps = steps.double()
    shifted = steps + _along(zero_point, axis, x.ndim).to(steps.dtype)
    return shifted.clamp(minimum, maximum).to(smallest_container(minimum, maximum))


def dequantize_tensor(codes: Tensor, scale: Tensor, zero_point: Tensor, axis: int) -> Tensor:
    """Return the values of ``codes``, in the scale's type.

    Args:
        codes: any integer type, any shape (a difference from the zero point beyond the type wraps, as in ONNX).
        scale: float32 or float64; shape [] with axis -1, else [codes.shape[axis]].
        zero_point: any integer type, the scale's shape.
        axis: the channel axis, or -1 for one scale per tensor.

    Raises:
        UsageError: types or shapes do not fit.
    """
    _check(codes, scale, zero_point, axis)
    if codes.is_floating_point() or codes.dtype == torch.bool:
        raise UsageError(f"dequantize codes of {codes.dtype}", expected="an integer type")
    wide = torch.int64 if codes.dtype == torch.int64 else torch.int32
    difference = codes.to(wide) - _along(zero_point, axis, codes.ndim).to(wide)
    return difference.to(scale.dtype) * _along(scale, axis, codes.ndim)


def _check(values: Tensor, scale: Tensor, zero_point: Tensor, axis: int) -> None:
    if not -1 <= axis < values.ndim:
        raise UsageError(f"channel axis {axis} of a tensor with {values.ndim} axes", expected="an axis of it, or -1")
    if scale.ndim != (axis >= 0) or zero_point.shape != scale.shape:
        raise UsageError(
            f"scale {list(scale.shape)} and zero point {list(zero_point.shape)} for axis {axis}",
            expected="both [] for axis -1, both [channels] else",
        )
    if axis >= 0 and scale.shape[0] != values.shape[axis]:
        raise UsageError(f"{scale.shape[0]} scales for {values.shape[axis]} channels", expected="one scale per channel")


def _along(parameter: Tensor, axis: int, ndim: int) -> Tensor:
    return parameter if axis < 0 else parameter.reshape([-1 if index == axis else 1 for index in range(ndim)])


def _beside(x: Tensor, params: QuantParams) -> tuple[Tensor, Tensor]:
    return params.scale.to(x.device, x.dtype), params.zero_point.to(x.device)
