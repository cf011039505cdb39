"""Defines ``torch.ops.normfuse.*``, the operators that a quantized graph carries; importing this module is enough.

    normfuse::quantize(Tensor x, Tensor scale, Tensor zero_point, int axis, int minimum, int maximum) -> Tensor
    normfuse::quantize_float8(Tensor x, Tensor scale, Tensor zero_point, int axis) -> Tensor
    normfuse::dequantize(Tensor codes, Tensor scale, Tensor zero_point, int axis) -> Tensor
    normfuse::quantize_logarithm(Tensor x, Tensor scale, int axis, int count, int per_octave, bool top_is_zero)
        -> Tensor
    normfuse::dequantize_logarithm(Tensor codes, Tensor scale, int axis, int count, int per_octave, bool top_is_zero)
        -> Tensor
    normfuse::unpack(Tensor codes, Tensor scale) -> Tensor
    normfuse::grouped_linear(Tensor x, Tensor codes, Tensor scale, Tensor? zero_point, Tensor? bias, int size,
        bool rounds) -> Tensor
    normfuse::grouped_lookup(Tensor codes, Tensor scale, Tensor indices, int size) -> Tensor
    normfuse::reshape(Tensor x, SymInt[] shape) -> Tensor

Axis -1 stands for one scale per tensor; ``minimum`` and ``maximum`` also decide the type of the codes (uint8 ...).
The two of logarithms are for simulation: the exporter has no translation for them.
What they compute is written in ``normfuse.kernels.reference``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import Tensor

from normfuse.kernels import reference
from normfuse.quant.float_type import FLOAT8
from normfuse.quant.integer_type import smallest_container

__all__ = [
    "DEQUANTIZE",
    "DEQUANTIZE_LOGARITHM",
    "GROUPED_LINEAR",
    "GROUPED_LOOKUP",
    "QUANTIZE",
    "QUANTIZE_FLOAT8",
    "QUANTIZE_LOGARITHM",
    "RESHAPE",
    "UNPACK",
]


def _quantize_shape(x: Tensor, scale: Tensor, zero_point: Tensor, axis: int, minimum: int, maximum: int) -> Tensor:
    return torch.empty_like(x, dtype=smallest_container(minimum, maximum))


def _quantize_float8_shape(x: Tensor, scale: Tensor, zero_point: Tensor, axis: int) -> Tensor:
    return torch.empty_like(x, dtype=FLOAT8.torch_dtype)


def _dequantize_shape(codes: Tensor, scale: Tensor, zero_point: Tensor, axis: int) -> Tensor:
    return torch.empty_like(codes, dtype=scale.dtype)


def _quantize_logarithm_shape(
    x: Tensor, scale: Tensor, axis: int, count: int, per_octave: int, top_is_zero: bool
) -> Tensor:
    return torch.empty_like(x, dtype=smallest_container(0, count - 1))


def _dequantize_logarithm_shape(
    codes: Tensor, scale: Tensor, axis: int, count: int, per_octave: int, top_is_zero: bool
) -> Tensor:
    return torch.empty_like(codes, dtype=scale.dtype)


def _unpack_shape(codes: Tensor, scale: Tensor) -> Tensor:
    return torch.empty_like(codes, dtype=scale.dtype)


def _grouped_linear_shape(
    x: Tensor, codes: Tensor, scale: Tensor, zero_point: Tensor | None, bias: Tensor | None, size: int, rounds: bool
) -> Tensor:
    return x.new_empty((*x.shape[:-1], codes.shape[0]))


def _grouped_lookup_shape(codes: Tensor, scale: Tensor, indices: Tensor, size: int) -> Tensor:
    return scale.new_empty((*indices.shape, codes.shape[1]))


def _reshaped(x: Tensor, shape: Sequence[int]) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format).reshape(list(shape))


def _define() -> None:
    # Defined again (a reload), an operator becomes another object, and the nodes of older graphs no longer match it.
    if hasattr(torch.ops.normfuse, "quantize"):
        return
    torch.library.custom_op("normfuse::quantize", reference.quantize, mutates_args=()).register_fake(_quantize_shape)
    torch.library.custom_op("normfuse::quantize_float8", reference.quantize_float8, mutates_args=()).register_fake(
        _quantize_float8_shape
    )
    torch.library.custom_op("normfuse::dequantize", reference.dequantize, mutates_args=()).register_fake(
        _dequantize_shape
    )
    torch.library.custom_op(
        "normfuse::quantize_logarithm", reference.quantize_logarithm, mutates_args=()
    ).register_fake(_quantize_logarithm_shape)
    torch.library.custom_op(
        "normfuse::dequantize_logarithm", reference.dequantize_logarithm, mutates_args=()
    ).register_fake(_dequantize_logarithm_shape)
    torch.library.custom_op("normfuse::unpack", reference.unpack, mutates_args=()).register_fake(_unpack_shape)
    torch.library.custom_op("normfuse::grouped_linear", reference.grouped_linear, mutates_args=()).register_fake(
        _grouped_linear_shape
    )
    torch.library.custom_op("normfuse::grouped_lookup", reference.grouped_lookup, mutates_args=()).register_fake(
        _grouped_lookup_shape
    )
    torch.library.custom_op("normfuse::reshape", reference.reshape, mutates_args=()).register_fake(_reshaped)


_define()

QUANTIZE: Final[Any] = torch.ops.normfuse.quantize.default
QUANTIZE_FLOAT8: Final[Any] = torch.ops.normfuse.quantize_float8.default
DEQUANTIZE: Final[Any] = torch.ops.normfuse.dequantize.default
QUANTIZE_LOGARITHM: Final[Any] = torch.ops.normfuse.quantize_logarithm.default
DEQUANTIZE_LOGARITHM: Final[Any] = torch.ops.normfuse.dequantize_logarithm.default
UNPACK: Final[Any] = torch.ops.normfuse.unpack.default
GROUPED_LINEAR: Final[Any] = torch.ops.normfuse.grouped_linear.default
GROUPED_LOOKUP: Final[Any] = torch.ops.normfuse.grouped_lookup.default
RESHAPE: Final[Any] = torch.ops.normfuse.reshape.default
"""A reshape that torch leaves whole: taken apart, it becomes a view wherever fake strides allow one."""
