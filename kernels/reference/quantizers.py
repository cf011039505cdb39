"""From floats to codes and back, and products of floats with weights held as codes.

`quantize` and `dequantize` are the functions of ``normfuse.quant`` on bare tensors, because calibration computes with
the same ones.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from normfuse.quant.dynamic_rows import DynamicParams, round_rows
from normfuse.quant.granularity import PER_TENSOR, PerChannel, PerGroup
from normfuse.quant.logarithm import dequantize_logarithm, quantize_logarithm
from normfuse.quant.rounding import dequantize_tensor as dequantize
from normfuse.quant.rounding import quantize_tensor as quantize
from normfuse.quant.rounding import to_float8, to_values

__all__ = [
    "dequantize",
    "dequantize_logarithm",
    "grouped_linear",
    "grouped_lookup",
    "quantize",
    "quantize_float8",
    "quantize_logarithm",
    "reshape",
    "unpack",
]


def unpack(codes: Tensor, scale: Tensor) -> Tensor:
    """Return the float weight that symmetric codes stand for: ``codes * scale`` along axis 0, in the scale's type."""
    return dequantize(codes, scale, torch.zeros_like(scale, dtype=torch.int32), 0)


def quantize_float8(x: Tensor, scale: Tensor, zero_point: Tensor, axis: int) -> Tensor:
    """Return 8-bit floats (E4M3FN) for ``x``; ``zero_point`` is 0 and says ONNX their type.

    Args:
        x: float32 or float64, any shape.
        scale: x's type, positive; shape [] with axis -1, else [x.shape[axis]].
        zero_point: zeros of the scale's shape.
        axis: the channel axis, or -1 for one scale per tensor.
    """
    on = PER_TENSOR if axis == -1 else PerChannel(axis)
    return to_float8(x, on.spread(scale, x.shape))


def grouped_linear(
    x: Tensor, codes: Tensor, scale: Tensor, zero_point: Tensor | None, bias: Tensor | None, size: int, rounds: bool
) -> Tensor:
    """Return ``x W^T + bias`` for a weight held as codes, in float.

    Args:
        x: float [..., in].
        codes: integers [out, in].
        scale: x's type, [out, ceil(in / size)]: one for every ``size`` neighbours of a row.
        zero_point: integers of the scale's shape; None for zeros.
        bias: x's type, [out], or None.
        size: neighbours that share a scale.
        rounds: whether ``x`` is first moved to codes of its own, one scale per row and group (``round_rows``).
    """
    on, shape = PerGroup(1, size), codes.shape
    zero = torch.zeros_like(scale, dtype=torch.int32) if zero_point is None else zero_point
    weight = to_values(codes, on.spread(scale, shape), on.spread(zero, shape))
    return torch.nn.functional.linear(round_rows(x, DynamicParams(size=size)) if rounds else x, weight, bias)


def grouped_lookup(codes: Tensor, scale: Tensor, indices: Tensor, size: int) -> Tensor:
    """Return rows of a table held as codes, [*indices, channels], in the scale's type.

    Args:
        codes: integers [rows, channels].
        scale: [rows, ceil(channels / size)]: one for every ``size`` neighbours of a row.
        indices: integers of any shape, 0 ... rows - 1.
        size: neighbours that share a scale.
    """
    found, shape = codes[indices], (*indices.shape, codes.shape[1])
    spread = PerGroup(indices.ndim, size).spread(scale[indices], shape)
    return to_values(found, spread, torch.zeros_like(spread, dtype=torch.int32))


def reshape(x: Tensor, shape: Sequence[int]) -> Tensor:
    """Return a copy of ``x`` in another shape; one size may be -1."""
    return x.reshape(list(shape)).clone()
