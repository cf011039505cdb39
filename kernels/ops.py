"""Defines ``torch.ops.normfuse.*``, the operators that a quantized graph carries; importing this module is enough.

    normfuse::quantize(Tensor x, Tensor scale, Tensor zero_point, int axis, int minimum, int maximum) -> Tensor
    normfuse::dequantize(Tensor codes, Tensor scale, Tensor zero_point, int axis) -> Tensor

Axis -1 stands for one scale per tensor. What they compute is written in ``normfuse.kernels.reference``.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor

from normfuse.kernels import reference
from normfuse.quant.integer_type import smallest_container

__all__ = ["DEQUANTIZE", "QUANTIZE", "dequantize", "quantize"]


@torch.library.custom_op("normfuse::quantize", mutates_args=())
def quantize(x: Tensor, scale: Tensor, zero_point: Tensor, axis: int, minimum: int, maximum: int) -> Tensor:
    """Return the codes of ``x``; the ends ``minimum`` and ``maximum`` also decide their type (uint8, int8 ...)."""
    return reference.quantize(x, scale, zero_point, axis, minimum, maximum)


@quantize.register_fake
def _(x: Tensor, scale: Tensor, zero_point: Tensor, axis: int, minimum: int, maximum: int) -> Tensor:
    return torch.empty_like(x, dtype=smallest_container(minimum, maximum))


@torch.library.custom_op("normfuse::dequantize", mutates_args=())
def dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor, axis: int) -> Tensor:
    """Return the values of ``codes``, in the scale's type."""
    return reference.dequantize(codes, scale, zero_point, axis)


@dequantize.register_fake
def _(codes: Tensor, scale: Tensor, zero_point: Tensor, axis: int) -> Tensor:
    return torch.empty_like(codes, dtype=scale.dtype)


QUANTIZE: Final[Any] = torch.ops.normfuse.quantize.default
DEQUANTIZE: Final[Any] = torch.ops.normfuse.dequantize.default
"""The overloads, as graph nodes name them."""
