"""Per-channel symmetric scales of constant weights."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Final

import torch
from torch import Tensor

from normfuse.errors import UsageError
from normfuse.quant.granularity import PerChannel
from normfuse.quant.integer_type import INT32, IntegerType
from normfuse.quant.parameters import SMALLEST_SCALE, QuantParams, symmetric
from normfuse.quant.rounding import dequantize, quantize, quantize_dequantize

__all__ = ["RoundedWeight", "WeightClip", "round_to_nearest", "scale_for_bias", "weight_params"]

COARSE: Final = [count / 20 for count in range(20, 2, -1)]
"""Clip points tried first, as fractions of the largest magnitude: 1.0, 0.95 ... 0.15."""

FINE: Final = [count / 100 for count in (-4, -3, -2, -1, 1, 2, 3, 4)]
"""Offsets tried around the best of them."""


class WeightClip(Enum):
    """Where the range of a weight channel ends."""

    MAXIMUM = "at its largest magnitude"
    MSE = "where the squared error of its values is least"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RoundedWeight:
    """A linear map's weight as codes, and the float bias that goes with it.

    Attributes:
        codes: of the weight's shape, in ``params.type.torch_dtype``.
        params: what the codes stand for.
        bias: float32 [out], or None.
    """

    codes: Tensor
    params: QuantParams
    bias: Tensor | None

    @property
    def values(self) -> Tensor:
        """The weight that the codes stand for, float32."""
        return dequantize(self.codes, self.params)


def round_to_nearest(
    weight: Tensor, bias: Tensor | None, type: IntegerType, *, input_scale: float | None, clip: WeightClip
) -> RoundedWeight:
    """Return the weight with every number rounded to its nearest code, channel by channel of axis 0.

    Args:
        weight: [out, ...], float.
        bias: [out] or None.
        type: a signed type.
        input_scale: the scale of the codes that meet the weight, where the bias is held at the product's scale; None
            where activations stay float.
        clip: where the ranges end.
    """
    params = weight_params(weight, 0, type, clip=clip)
    if bias is not None and input_scale is not None:
        params = scale_for_bias(params, input_scale=input_scale, bias=bias)
    return RoundedWeight(codes=quantize(weight, params), params=params, bias=bias)


def weight_params(
    weight: Tensor, axis: int, type: IntegerType, *, clip: WeightClip = WeightClip.MAXIMUM
) -> QuantParams:
    """Return one symmetric scale per channel of ``weight``; a channel of zeros takes the largest scale beside it.

    Args:
        weight: any float type, any shape with ``axis``.
        axis: the output channels: 0 for linear and convolution weights.
        type: a signed type.
        clip: where the ranges end. The search tries 26 ends per channel and never does worse than the maximum.

    Raises:
        UsageError: the axis does not exist, the type is unsigned, or a weight is not finite.
    """
    if not 0 <= axis < weight.ndim or weight.numel() == 0:
        raise UsageError(f"channel axis {axis} of a weight of shape {list(weight.shape)}", expected="an axis of it")
    rows = weight.detach().movedim(axis, 0).reshape(weight.shape[axis], -1).float()
    largest = rows.abs().amax(dim=1).double()
    magnitude = largest if clip is WeightClip.MAXIMUM else _search(rows, largest, type)
    return symmetric(magnitude, type, PerChannel(axis))


def scale_for_bias(params: QuantParams, *, input_scale: float, bias: Tensor) -> QuantParams:
    """Return the parameters with scales raised where ``bias`` would not fit an int32 of scale ``input_scale * scale``.

    Near-dead channels have tiny weights beside an ordinary bias; half of the int32 range is left to the products.

    Args:
        params: the weight's parameters, per channel.
        input_scale: the scale of the activation that the weight multiplies.
        bias: the float bias, [channels].

    Raises:
        UsageError: the shapes differ.
    """
    if bias.shape != params.scale.shape:
        raise UsageError(f"a bias of {list(bias.shape)} for scales of {list(params.scale.shape)}", expected="one shape")
    largest_code = INT32.maximum // 2
    product = (bias.detach().to(params.scale.device).double().abs() / largest_code).clamp(min=SMALLEST_SCALE)
    scale = torch.maximum(params.scale.double(), product / input_scale)
    return QuantParams(
        scale=_rounded_up(scale), zero_point=params.zero_point, type=params.type, granularity=params.granularity
    )


def _search(rows: Tensor, largest: Tensor, type: IntegerType) -> Tensor:
    """Return the clip point of least squared error per row, [channels] float64."""
    fraction = torch.ones_like(largest)
    error = _squared_error(rows, largest, type)
    for offset in COARSE[1:]:
        fraction, error = _better(rows, largest, torch.full_like(fraction, offset), (fraction, error), type)
    centre = fraction
    for offset in FINE:
        fraction, error = _better(rows, largest, (centre + offset).clamp(max=1.0), (fraction, error), type)
    return largest * fraction


def _better(
    rows: Tensor, largest: Tensor, fraction: Tensor, best: tuple[Tensor, Tensor], type: IntegerType
) -> tuple[Tensor, Tensor]:
    error = _squared_error(rows, largest * fraction, type)
    is_better = error < best[1]
    return torch.where(is_better, fraction, best[0]), torch.where(is_better, error, best[1])


def _squared_error(rows: Tensor, magnitude: Tensor, type: IntegerType) -> Tensor:
    error = quantize_dequantize(rows, symmetric(magnitude, type, PerChannel(0))) - rows
    return error.square_().sum(dim=1, dtype=torch.float64)


def _rounded_up(scale: Tensor) -> Tensor:
    rounded = scale.float()
    return torch.where(rounded.double() < scale, torch.nextafter(rounded, torch.full_like(rounded, torch.inf)), rounded)
