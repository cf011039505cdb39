"""Codes between two neighbours: linear upsampling along one axis."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from normfuse.kernels.reference.rescaling import rounded_shift

__all__ = ["FRACTION", "int_interpolate"]

FRACTION: Final = 14
"""Bits of a weight: those of an upsampling by a power of two are exact."""


def int_interpolate(x: Tensor, low: Tensor, high: Tensor, weight: Tensor, axis: int) -> Tensor:
    """Return ``x[low] + (x[high] - x[low]) weight / 2^14`` along an axis, in x's codes and type (ours).

    "I-Segmenter" (2025, arXiv 2509.10334) repeats the nearest instead; bilinear upsampling is two of these.

    Args:
        x: int8 or int16 of any shape.
        low: int64 [size], where the neighbour in front stands.
        high: int64 [size], where the one behind stands.
        weight: int32 [size, 1, ...], broadcast against the result: 0 ... 2^14, of the one behind.
        axis: what is upsampled, 0 or more.
    """
    wide = x.to(torch.int64)
    before, behind = wide.index_select(axis, low), wide.index_select(axis, high)
    return rounded_shift((before << FRACTION) + (behind - before) * weight, FRACTION).to(x.dtype)
