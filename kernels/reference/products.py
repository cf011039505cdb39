"""Products of 8-bit codes, summed up in 32 bits and rescaled before anything is written.

A sum is exact, so its order means nothing. It is computed in float64 here, which holds every integer below 2^53.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from normfuse.kernels.reference.rescaling import rescale
from normfuse.kernels.reference.tables import int_table

__all__ = [
    "int_conv2d",
    "int_conv2d_add",
    "int_linear",
    "int_linear_add",
    "int_linear_table",
    "int_matmul",
    "linear_sums",
]


def int_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    multiplier: Tensor,
    shift: int,
    zero_point: int,
    minimum: int,
    maximum: int,
) -> Tensor:
    """Return the codes of ``x W^T + b``.

    Args:
        x: int8 [..., in].
        weight: int8 [out, in].
        bias: int32 [out], at the scale of the sums; holds what undoes x's zero point.
        multiplier: int32 [out], see ``rescale``.
        shift: see ``rescale``.
        zero_point: the code of zero.
        minimum: the smallest code; the zero point for a ReLU.
        maximum: the largest code, see ``rescale``.
    """
    return rescale(linear_sums(x, weight), bias, multiplier, shift, zero_point, minimum, maximum)


def int_linear_add(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    multiplier: Tensor,
    residual: Tensor,
    residual_multiplier: int,
    shift: int,
    zero_point: int,
    minimum: int,
    maximum: int,
) -> Tensor:
    """Return the codes of ``x W^T + b + residual``, rounded once.

    Args:
        x: as for ``int_linear``.
        weight: as for ``int_linear``.
        bias: as for ``int_linear``; what undoes the residual's zero point is in here too.
        multiplier: as for ``int_linear``.
        residual: int8 or int16, broadcast against the result.
        residual_multiplier: its scale over the result's, times 2^shift; up to 46 bits.
        shift: see ``rescale``.
        zero_point: see ``rescale``.
        minimum: see ``rescale``.
        maximum: see ``rescale``.
    """
    return _with_residual(
        linear_sums(x, weight) + bias, multiplier, residual, residual_multiplier, shift, zero_point, minimum, maximum
    )


def int_linear_table(
    x: Tensor, weight: Tensor, bias: Tensor, multiplier: Tensor, table: Tensor, shift: int, zero_point: int
) -> Tensor:
    """Return ``int_table(int_linear(...), table)``: a linear map and any function of one number, GELU for example.

    Args:
        x: as for ``int_linear``.
        weight: as for ``int_linear``.
        bias: as for ``int_linear``.
        multiplier: as for ``int_linear``.
        table: int8 or int16 [256], for the codes -128 ... 127.
        shift: see ``rescale``.
        zero_point: see ``rescale``.
    """
    return int_table(int_linear(x, weight, bias, multiplier, shift, zero_point, -128, 127), table)


def int_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    multiplier: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    x_zero_point: int,
    shift: int,
    zero_point: int,
    minimum: int,
    maximum: int,
) -> Tensor:
    """Return the codes of a convolution.

    Args:
        x: int8 [batch, channels, height, width]; what is padded has the code of zero.
        weight: int8 [out, channels / groups, height, width].
        bias: int32 [out], at the scale of the sums.
        multiplier: int32 [out], see ``rescale``.
        stride: of height and width.
        padding: of both ends of height and of width.
        dilation: of height and width.
        groups: as in ``torch.nn.functional.conv2d``.
        x_zero_point: x's code of zero; it is taken off before the sums.
        shift: see ``rescale``.
        zero_point: see ``rescale``.
        minimum: see ``rescale``.
        maximum: see ``rescale``.
    """
    sums = _convolved(x, weight, stride, padding, dilation, groups, x_zero_point)
    return rescale(sums, _of_channels(bias), _of_channels(multiplier), shift, zero_point, minimum, maximum)


def int_conv2d_add(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    multiplier: Tensor,
    residual: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    x_zero_point: int,
    residual_multiplier: int,
    shift: int,
    zero_point: int,
    minimum: int,
    maximum: int,
) -> Tensor:
    """Return the codes of a convolution plus ``residual``, rounded once.

    Args:
        x: as for ``int_conv2d``.
        weight: as for ``int_conv2d``.
        bias: as for ``int_conv2d``; what undoes the residual's zero point is in here too.
        multiplier: as for ``int_conv2d``.
        residual: int8 or int16, broadcast against the result.
        stride: as for ``int_conv2d``.
        padding: as for ``int_conv2d``.
        dilation: as for ``int_conv2d``.
        groups: as for ``int_conv2d``.
        x_zero_point: as for ``int_conv2d``.
        residual_multiplier: as for ``int_linear_add``.
        shift: see ``rescale``.
        zero_point: see ``rescale``.
        minimum: see ``rescale``.
        maximum: see ``rescale``.
    """
    sums = _convolved(x, weight, stride, padding, dilation, groups, x_zero_point) + _of_channels(bias)
    return _with_residual(
        sums, _of_channels(multiplier), residual, residual_multiplier, shift, zero_point, minimum, maximum
    )


def int_matmul(
    x: Tensor, y: Tensor, multiplier: int, shift: int, zero_point: int, minimum: int, maximum: int
) -> Tensor:
    """Return the codes of a product of two activations whose zero points are 0.

    Args:
        x: int8 [..., rows, inner].
        y: int8 [..., inner, columns].
        multiplier: the product of their scales over the result's, times 2^shift.
        shift: see ``rescale``.
        zero_point: see ``rescale``.
        minimum: see ``rescale``.
        maximum: see ``rescale``.
    """
    sums = (x.double() @ y.double()).to(torch.int64)
    none, ratio = torch.zeros((), dtype=torch.int32), torch.tensor(multiplier)
    return rescale(sums, none, ratio, shift, zero_point, minimum, maximum)


def linear_sums(x: Tensor, weight: Tensor) -> Tensor:
    """Return ``x W^T`` of int8 x [..., in] and weight [out, in] as int64."""
    return functional.linear(x.double(), weight.double()).to(torch.int64)


def _convolved(
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    x_zero_point: int,
) -> Tensor:
    values = x.double() - x_zero_point
    return functional.conv2d(values, weight.double(), None, list(stride), list(padding), list(dilation), groups).to(
        torch.int64
    )


def _of_channels(vector: Tensor) -> Tensor:
    return vector.reshape(-1, 1, 1)


def _with_residual(
    sums: Tensor,
    multiplier: Tensor,
    residual: Tensor,
    residual_multiplier: int,
    shift: int,
    zero_point: int,
    minimum: int,
    maximum: int,
) -> Tensor:
    total = sums * multiplier.to(torch.int64) + residual.to(torch.int64) * residual_multiplier
    none, one = torch.zeros((), dtype=torch.int32), torch.ones((), dtype=torch.int32)
    return rescale(total, none, one, shift, zero_point, minimum, maximum)
