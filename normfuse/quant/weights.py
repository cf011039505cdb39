"""The scales of constant weights, per channel or per group."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum
from typing import Final

import torch
from torch import Tensor

from normfuse.errors import UsageError
from normfuse.quant.existing_grid import existing_steps
from normfuse.quant.float_type import CodeType, FloatType
from normfuse.quant.granularity import PerChannel, PerGroup
from normfuse.quant.integer_type import INT32
from normfuse.quant.parameters import SMALLEST_SCALE, QuantParams, asymmetric, symmetric
from normfuse.quant.rounding import dequantize, quantize, quantize_dequantize

__all__ = ["RoundedWeight", "WeightClip", "round_to_nearest", "scale_for_bias", "weight_params"]

COARSE: Final = [count / 20 for count in range(20, 2, -1)]
"""Clip points tried first, as fractions of the largest magnitude: 1.0, 0.95 ... 0.15."""

FINE: Final = [count / 100 for count in (-4, -3, -2, -1, 1, 2, 3, 4)]
"""Offsets tried around the best of them."""

BOTH, LOW, HIGH = slice(0, 2), slice(0, 1), slice(1, 2)
"""Which ends of [2, rows] move."""


class WeightClip(Enum):
    """Where the range of a weight channel ends."""

    MAXIMUM = "at its largest magnitude"
    MSE = "where the squared error of its values is least, or at the end of the grid that they are on already"


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

    def holds_bias(self, input_scale: float | None) -> bool:
        """Return whether the bias fits an int32 beside these codes, behind an input of that scale (None: float)."""
        if self.bias is None or input_scale is None:
            return True
        needed = scale_for_bias(self.params, input_scale=input_scale, bias=self.bias)
        return torch.equal(needed.scale, self.params.scale)


def round_to_nearest(
    weight: Tensor,
    bias: Tensor | None,
    type: CodeType,
    *,
    input_scale: float | None,
    group: int | None = None,
    is_symmetric: bool = True,
) -> RoundedWeight:
    """Return the weight with every number rounded to its nearest code, channel by channel of axis 0, clipped by MSE.

    Args:
        weight: [out, ...], float.
        bias: [out] or None.
        type: a signed type.
        input_scale: the scale of the codes that meet the weight, where the bias is held at the product's scale; None
            where activations stay float.
        group: how many neighbours on axis 1 share a scale; None: all of a channel. Only behind float activations.
        is_symmetric: whether zero points are 0.
    """
    params = weight_params(weight, 0, type, clip=WeightClip.MSE, group=group, is_symmetric=is_symmetric)
    if bias is not None and input_scale is not None:
        if not bool(weight.any()):  # any scale is exact for it: then one at which the bias is
            params = replace(params, scale=torch.full_like(params.scale, SMALLEST_SCALE))
        params = scale_for_bias(params, input_scale=input_scale, bias=bias)
    return RoundedWeight(codes=quantize(weight, params), params=params, bias=bias)


def weight_params(
    weight: Tensor,
    axis: int,
    type: CodeType,
    *,
    clip: WeightClip = WeightClip.MAXIMUM,
    group: int | None = None,
    is_symmetric: bool = True,
) -> QuantParams:
    """Return one scale per channel of ``weight``, or per group; where all is zero, the largest scale beside it.

    Args:
        weight: any float type, any shape with ``axis``.
        axis: the output channels: 0 for linear and convolution weights.
        type: a signed type, or any if not symmetric.
        clip: where the ranges end. The search tries 26 ends per scale, 68 if not symmetric, and never does worse than
            the maximum. Symmetric weights that are on a grid of the type already keep it (``existing_steps``).
        group: how many neighbours on the axis of the inputs (1 beside an ``axis`` of 0, else 0) share a scale; None for
            all weights of a channel.
        is_symmetric: whether zero points are 0.

    Raises:
        UsageError: the axes do not exist, the type is unsigned but symmetric, or a weight is not finite.
    """
    if not 0 <= axis < weight.ndim or weight.numel() == 0 or (group is not None and weight.ndim == 1):
        raise UsageError(f"channel axis {axis} of a weight of shape {list(weight.shape)}", expected="an axis of it")
    granularity = PerChannel(axis) if group is None else PerGroup(0 if axis else 1, group)
    rows, scales = _rows(weight.detach().float(), granularity)
    ends = torch.stack([rows.amin(dim=1).clamp(max=0), rows.amax(dim=1).clamp(min=0)]).double()
    if isinstance(type, FloatType):
        clip = WeightClip.MAXIMUM  # small values lose nothing by large ones
    if clip is WeightClip.MSE:
        ends = _search(rows, ends, type, is_symmetric)
    found = _params(ends, type, is_symmetric)
    if clip is WeightClip.MSE and is_symmetric:  # a search among ends may pass by the one without any error
        steps = existing_steps(rows, type)
        found = replace(found, scale=torch.where(steps > 0, steps, found.scale))
    scale, zero_point = scales(found.scale), scales(found.zero_point)
    return QuantParams(scale=scale, zero_point=zero_point, type=type, granularity=granularity)


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


def _rows(weight: Tensor, granularity: PerChannel | PerGroup) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Return the weights that share a scale as rows, and what gives [rows] the shape of the scales."""
    axis = granularity.axis
    if isinstance(granularity, PerChannel):
        return weight.movedim(axis, 0).reshape(weight.shape[axis], -1), lambda parameter: parameter
    missing = -weight.shape[axis] % granularity.size
    padded = torch.nn.functional.pad(weight.movedim(axis, -1), (0, missing))  # zeros widen no range and have no error
    blocks = padded.reshape(*padded.shape[:-1], -1, granularity.size)
    return blocks.flatten(0, -2), lambda parameter: parameter.reshape(blocks.shape[:-1]).movedim(-1, axis).contiguous()


def _params(ends: Tensor, type: CodeType, is_symmetric: bool) -> QuantParams:
    """Return the parameters of rows with ``ends`` [2, rows]: at most 0, at least 0."""
    low, high = ends
    if is_symmetric or isinstance(type, FloatType):
        return symmetric(torch.maximum(-low, high), type, PerChannel(0))
    return asymmetric(low, high, type, PerChannel(0))


def _search(rows: Tensor, ends: Tensor, type: CodeType, is_symmetric: bool) -> Tensor:
    """Return the ends of least squared error per row, [2, rows] float64: both moved together, then each alone."""
    error = _squared_error(rows, ends, type, is_symmetric)
    kept = torch.ones_like(ends)

    def attempt(side: slice, fraction: Tensor | float) -> None:
        nonlocal kept, error
        tried = kept.clone()
        tried[side] = fraction
        new = _squared_error(rows, ends * tried, type, is_symmetric)
        kept, error = torch.where(new < error, tried, kept), torch.minimum(new, error)

    sides = [BOTH] if is_symmetric else [BOTH, LOW, HIGH]
    for side in sides:
        for fraction in COARSE[1:]:
            attempt(side, fraction)
    for side in sides[-2:]:
        centre = kept[side]
        for offset in FINE:
            attempt(side, (centre + offset).clamp(max=1.0))
    return ends * kept


def _squared_error(rows: Tensor, ends: Tensor, type: CodeType, is_symmetric: bool) -> Tensor:
    error = quantize_dequantize(rows, _params(ends, type, is_symmetric)) - rows
    return error.square_().sum(dim=1, dtype=torch.float64)


def _rounded_up(scale: Tensor) -> Tensor:
    rounded = scale.float()
    return torch.where(rounded.double() < scale, torch.nextafter(rounded, torch.full_like(rounded, torch.inf)), rounded)
