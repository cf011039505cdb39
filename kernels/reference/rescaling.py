"""The one way from integers at one scale to codes at another, and the operators that are little more than it.

    q = clip(((x + bias) * multiplier + 2^(shift - 1)) >> shift) + zero_point, minimum, maximum)

``multiplier / 2^shift`` is the ratio of the scales, ``>>`` rounds down, so a half is rounded up: the only rounding of
the integer operators. Everything between is a 64-bit integer; whoever makes the constants proves that it stays below
2^62 in magnitude (``normfuse.quant.dyadic``). Codes are int8 where it holds both ends, else int16.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["codes_type", "int_add", "int_mean", "int_multiply", "rescale", "rounded_shift"]


def codes_type(minimum: int, maximum: int) -> torch.dtype:
    """Return the type of codes between two ends: int8 where it holds both."""
    narrow = torch.iinfo(torch.int8)
    return torch.int8 if narrow.min <= minimum and maximum <= narrow.max else torch.int16


def rounded_shift(x: Tensor, shift: int) -> Tensor:
    """Return ``x / 2^shift`` rounded to the nearest integer, halves up; ``shift`` is 1 or more."""
    return (x + (1 << (shift - 1))) >> shift


def rescale(
    x: Tensor, bias: Tensor, multiplier: Tensor, shift: int, zero_point: int, minimum: int, maximum: int
) -> Tensor:
    """Return codes at another scale, or at one of its own for every channel (ours; see the head of this file).

    The operator ``requantize`` is this: a frozen norm in front of a product is the multiplier and the bias of its
    channels, so it costs nothing.

    Args:
        x: integers of any shape.
        bias: int32, broadcast against x: what is added in x's own scale; what undoes its zero point is in here.
        multiplier: int32, broadcast against x: the ratio of the scales, times 2^shift.
        shift: 1 to 62.
        zero_point: the code of zero.
        minimum: the smallest code.
        maximum: the largest code.
    """
    scaled = (x.to(torch.int64) + bias.to(torch.int64)) * multiplier.to(torch.int64)
    return _saturated(rounded_shift(scaled, shift), zero_point, minimum, maximum)


def int_add(
    x: Tensor,
    y: Tensor,
    x_multiplier: int,
    y_multiplier: int,
    offset: int,
    shift: int,
    zero_point: int,
    minimum: int,
    maximum: int,
) -> Tensor:
    """Return the codes of a sum: both operands are brought to its scale and rounded once, together (ours).

    Args:
        x: int8 or int16.
        y: int8 or int16, broadcast against x.
        x_multiplier: x's scale over the sum's, times 2^shift.
        y_multiplier: the same of y; negative for a difference.
        offset: what undoes the zero points, at the scale of the products.
        shift: as for ``rescale``.
        zero_point: as for ``rescale``.
        minimum: as for ``rescale``.
        maximum: as for ``rescale``.
    """
    total = x.to(torch.int64) * x_multiplier + y.to(torch.int64) * y_multiplier + offset
    return _saturated(rounded_shift(total, shift), zero_point, minimum, maximum)


def int_multiply(
    x: Tensor,
    y: Tensor,
    x_zero_point: int,
    y_zero_point: int,
    multiplier: int,
    shift: int,
    zero_point: int,
    minimum: int,
    maximum: int,
) -> Tensor:
    """Return the codes of an elementwise product (ours).

    Args:
        x: int8 or int16.
        y: int8 or int16, broadcast against x.
        x_zero_point: x's code of zero.
        y_zero_point: y's code of zero.
        multiplier: the product of both scales over the result's, times 2^shift.
        shift: as for ``rescale``.
        zero_point: as for ``rescale``.
        minimum: as for ``rescale``.
        maximum: as for ``rescale``.
    """
    product = (x.to(torch.int64) - x_zero_point) * (y.to(torch.int64) - y_zero_point)
    return _saturated(rounded_shift(product * multiplier, shift), zero_point, minimum, maximum)


def int_mean(
    x: Tensor,
    axes: Sequence[int],
    keeps_axes: bool,
    offset: int,
    multiplier: int,
    shift: int,
    zero_point: int,
    minimum: int,
    maximum: int,
) -> Tensor:
    """Return the codes of a mean over axes: the exact sum, rescaled once (ours).

    Args:
        x: int8 or int16.
        axes: what is summed over; their sizes are fixed, and part of the multiplier.
        keeps_axes: whether they stay, with size 1.
        offset: what undoes x's zero point, in the sum's scale.
        multiplier: x's scale over the mean's and the number of summands, times 2^shift.
        shift: as for ``rescale``.
        zero_point: as for ``rescale``.
        minimum: as for ``rescale``.
        maximum: as for ``rescale``.
    """
    total = x.to(torch.int64).sum(list(axes), keepdim=keeps_axes) + offset
    return _saturated(rounded_shift(total * multiplier, shift), zero_point, minimum, maximum)


def _saturated(x: Tensor, zero_point: int, minimum: int, maximum: int) -> Tensor:
    return (x + zero_point).clamp(minimum, maximum).to(codes_type(minimum, maximum))
