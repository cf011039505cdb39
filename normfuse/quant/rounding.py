"""Quantize and dequantize, the one place where rounding and saturation are written.

The rules are those of ONNX QuantizeLinear and DequantizeLinear as onnxruntime computes them, so that a simulation and
an engine agree bit for bit:

    code = saturate(round_half_to_even(x / scale) + zero_point)      the quotient rounded in x's own type
    real = (code - zero_point) * scale                               an integer difference, the product in scale's type

Codes may be 8-bit floats, too: ``code = saturate(x / scale)``, rounded half to even, ``real = code * scale``.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from normfuse.errors import UsageError
from normfuse.quant.float_type import FLOAT8, FloatType
from normfuse.quant.granularity import PER_TENSOR, PerChannel, PerTensor
from normfuse.quant.integer_type import smallest_container
from normfuse.quant.parameters import QuantParams

__all__ = [
    "dequantize",
    "dequantize_tensor",
    "quantize",
    "quantize_dequantize",
    "quantize_tensor",
    "to_codes",
    "to_float8",
    "to_values",
]

SUBNORMAL_EXPONENT: Final = -9
"""The step between the smallest 8-bit floats is 2 to that; between others of an octave it is an eighth of its start."""

EXACT_IN_FLOAT32: Final = 1 << 24
"""Integers up to here are exact in float32, so shorter code ranges saturate without widening."""


def quantize(x: Tensor, params: QuantParams) -> Tensor:
    """Return the codes of ``x``, of its shape, in ``params.type.torch_dtype``; NaN has no code, any may come back."""
    scale, zero_point = _spread(params, x, x.dtype)
    if isinstance(params.type, FloatType):
        return to_float8(x, scale)
    return to_codes(x, scale, zero_point, params.type.minimum, params.type.maximum)


def dequantize(codes: Tensor, params: QuantParams) -> Tensor:
    """Return the float32 values that ``codes`` stand for."""
    return to_values(codes, *_spread(params, codes, torch.float32))


def quantize_dequantize(x: Tensor, params: QuantParams) -> Tensor:
    """Return ``x`` moved to the nearest value that has a code, in x's shape and type."""
    scale, zero_point = _spread(params, x, x.dtype)
    if isinstance(params.type, FloatType):
        return to_values(to_float8(x, scale), scale, zero_point)
    minimum, maximum = params.type.minimum, params.type.maximum
    if x.dtype != torch.float32 or maximum - minimum >= EXACT_IN_FLOAT32:
        return to_values(to_codes(x, scale, zero_point, minimum, maximum), scale, zero_point)
    # The same numbers: these codes and their differences are exact in float32, so integers need no memory of their own.
    zero = zero_point.to(torch.float32)
    return (x / scale).round_().add_(zero).clamp_(minimum, maximum).sub_(zero).mul_(scale)


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
    granularity = _on(axis)
    return to_codes(x, granularity.spread(scale, x.shape), granularity.spread(zero_point, x.shape), minimum, maximum)


def dequantize_tensor(codes: Tensor, scale: Tensor, zero_point: Tensor, axis: int) -> Tensor:
    """Return the values of ``codes``, in the scale's type.

    Args:
        codes: any integer type or 8-bit floats, any shape (a difference from the zero point beyond the type wraps, as
            in ONNX).
        scale: float32 or float64; shape [] with axis -1, else [codes.shape[axis]].
        zero_point: any integer type, the scale's shape.
        axis: the channel axis, or -1 for one scale per tensor.

    Raises:
        UsageError: types or shapes do not fit.
    """
    granularity = _on(axis)
    return to_values(codes, granularity.spread(scale, codes.shape), granularity.spread(zero_point, codes.shape))


def to_codes(x: Tensor, scale: Tensor, zero_point: Tensor, minimum: int, maximum: int) -> Tensor:
    """Return the codes of ``x``, as ``quantize_tensor``, by scales and zero points that broadcast to its shape."""
    if x.dtype != scale.dtype or x.dtype not in (torch.float32, torch.float64):
        raise UsageError(f"quantize {x.dtype} by a scale of {scale.dtype}", expected="both float32 or both float64")
    # A true division by a tensor on x's own device: by a CPU scalar, CUDA would multiply with the reciprocal.
    steps = torch.round(x / scale)
    if maximum - minimum >= EXACT_IN_FLOAT32:
        steps = steps.double()
    shifted = steps + zero_point.to(steps.dtype)
    return shifted.clamp(minimum, maximum).to(smallest_container(minimum, maximum))


def to_float8(x: Tensor, scale: Tensor) -> Tensor:
    """Return 8-bit floats for ``x`` by scales of its type that broadcast to its shape; NaN stays NaN."""
    quotient = (x / scale).clamp(FLOAT8.minimum, FLOAT8.maximum)
    if quotient.dtype is torch.float64:  # torch goes by way of float32, which would round twice
        _, exponent = torch.frexp(quotient)
        step = torch.ldexp(torch.ones_like(quotient), (exponent - 4).clamp(min=SUBNORMAL_EXPONENT))
        quotient = torch.round(quotient / step) * step
    return quotient.to(FLOAT8.torch_dtype)


def to_values(codes: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """Return the values of ``codes``, as ``dequantize_tensor``, by scales and zero points that broadcast to theirs."""
    if codes.dtype is FLOAT8.torch_dtype:
        return codes.to(scale.dtype) * scale
    if codes.is_floating_point() or codes.dtype == torch.bool:
        raise UsageError(f"dequantize codes of {codes.dtype}", expected="an integer type, or float8_e4m3fn")
    wide = torch.int64 if codes.dtype == torch.int64 else torch.int32
    difference = codes.to(wide) - zero_point.to(wide)
    return difference.to(scale.dtype) * scale


def _on(axis: int) -> PerTensor | PerChannel:
    return PER_TENSOR if axis == -1 else PerChannel(axis)


def _spread(params: QuantParams, x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    scale, zero_point = params.scale.to(x.device, dtype), params.zero_point.to(x.device)
    return params.granularity.spread(scale, x.shape), params.granularity.spread(zero_point, x.shape)
