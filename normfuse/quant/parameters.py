"""Scale and zero point of one tensor, checked once when they are made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from normfuse.errors import UsageError
from normfuse.quant.float_type import CodeType, FloatType
from normfuse.quant.granularity import PER_TENSOR, Granularity
from normfuse.quant.integer_type import IntegerType

__all__ = ["SMALLEST_SCALE", "QuantParams", "asymmetric", "symmetric"]

SMALLEST_SCALE: Final = 2.0**-126
"""The smallest normal float32: engines refuse a scale of zero and may flush a subnormal one to zero."""

SMALLEST_HALF: Final = 2.0**-14
"""The smallest normal float16: products of 8-bit floats are scaled in that type."""

SPARE_OCTAVES: Final = 16.0
"""How far the scale of 8-bit floats is raised for that at most: of their 15 octaves they lose the four smallest."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class QuantParams:
    """The map ``real = (code - zero_point) * scale`` of one tensor.

    Attributes:
        scale: float32, finite and at least ``SMALLEST_SCALE``; shape [] per tensor, [channels] per channel;
            per group the tensor's shape with one position per group on their axis.
        zero_point: int32, of the scale's shape, inside ``type``.
        type: the range of the codes.
        granularity: which axis the channels or groups are on, if any.

    Raises:
        UsageError: one of the above does not hold.
    """

    scale: Tensor
    zero_point: Tensor
    type: CodeType
    granularity: Granularity = PER_TENSOR

    def __post_init__(self) -> None:
        if not self.granularity.fits(self.scale.shape) or self.scale.shape != self.zero_point.shape:
            raise UsageError(
                f"scale of shape {list(self.scale.shape)}, zero point of shape {list(self.zero_point.shape)}",
                expected=f"both of one shape that fits {self.granularity}",
            )
        if self.scale.dtype != torch.float32 or self.zero_point.dtype != torch.int32:
            raise UsageError(
                f"scale of {self.scale.dtype}, zero point of {self.zero_point.dtype}", expected="float32 and int32"
            )
        if not bool((torch.isfinite(self.scale) & (self.scale >= SMALLEST_SCALE)).all()):
            raise UsageError("a scale that is not a positive normal float32", expected=f"{SMALLEST_SCALE} or more")
        if not bool(((self.zero_point >= self.type.minimum) & (self.zero_point <= self.type.maximum)).all()):
            raise UsageError(
                f"a zero point outside {self.type}", expected=f"{self.type.minimum} ... {self.type.maximum}"
            )

    @property
    def stored_zero_point(self) -> Tensor:
        """The zero point in the codes' own dtype, as graphs and ONNX files hold it."""
        return self.zero_point.to(self.type.torch_dtype)

    @property
    def smallest(self) -> Tensor:
        """The smallest real value that has a code, float64 (the engine's own product is float32)."""
        return (self.type.minimum - self.zero_point).double() * self.scale.double()

    @property
    def largest(self) -> Tensor:
        """The largest real value that has a code, float64."""
        return (self.type.maximum - self.zero_point).double() * self.scale.double()


def asymmetric(
    minimum: float | Tensor, maximum: float | Tensor, type: IntegerType, granularity: Granularity = PER_TENSOR
) -> QuantParams:
    """Return parameters whose codes cover ``minimum ... maximum``, widened to contain zero.

    Zero is exact, because the zero point is an integer. The widths of the two ends are kept up to half a step.
    Source: Jacob et al. 2018, section 3.

    Args:
        minimum: a number, or one per scale, in the scales' shape.
        maximum: the same; not below the minimum.
        type: the range of the codes.
        granularity: the axis that the channels or groups are on.

    Raises:
        UsageError: an end is not finite, or the ends are in the wrong order.
    """
    low = torch.as_tensor(minimum, dtype=torch.float64)
    high = torch.as_tensor(maximum, dtype=torch.float64)
    if not bool(torch.isfinite(low).all() and torch.isfinite(high).all() and (low <= high).all()):
        raise UsageError("a range that is not finite or ends before it begins", expected="minimum <= maximum")
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = _safe_scale((high - low) / (type.levels - 1))
    # The zero point belongs to the scale that the engine sees, so it is computed after the rounding to float32.
    zero_point = torch.round(type.minimum - low / scale.double()).clamp(type.minimum, type.maximum)
    return QuantParams(scale=scale, zero_point=zero_point.to(torch.int32), type=type, granularity=granularity)


def symmetric(maximum_absolute: float | Tensor, type: CodeType, granularity: Granularity = PER_TENSOR) -> QuantParams:
    """Return parameters with zero point 0 whose largest code stands for ``maximum_absolute``.

    The scale of 8-bit floats is raised where float16 would not hold it: only their smallest numbers change by that.

    Args:
        maximum_absolute: a number, or one per scale, in the scales' shape; zero marks a dead channel.
        type: a signed type.
        granularity: the axis that the channels or groups are on.

    Raises:
        UsageError: the type is unsigned, or a magnitude is negative or not finite.
    """
    if not type.signed:
        raise UsageError(f"a symmetric quantizer of {type}", expected="a signed type")
    magnitude = torch.as_tensor(maximum_absolute, dtype=torch.float64)
    if not bool((torch.isfinite(magnitude) & (magnitude >= 0)).all()):
        raise UsageError("a magnitude that is negative or not finite", expected="0 or more")
    scale = _safe_scale(magnitude / type.maximum)
    if isinstance(type, FloatType):
        scale = torch.maximum(scale, (scale * SPARE_OCTAVES).clamp(max=SMALLEST_HALF))
    zero_point = torch.zeros(scale.shape, dtype=torch.int32, device=scale.device)
    return QuantParams(scale=scale, zero_point=zero_point, type=type, granularity=granularity)


def _safe_scale(scale: Tensor) -> Tensor:
    """Return the float32 scale; a dead channel (all zero) takes the largest scale beside it, or 1.

    Any scale is exact for zeros. The smallest possible one would satisfy the engines too, but the int32 bias of such a
    channel, held at ``scale_x * scale_w``, would overflow.
    """
    neighbour = scale.max() if scale.numel() else scale.new_tensor(1.0)
    fallback = torch.where(neighbour > 0, neighbour, 1.0)
    return torch.where(scale > 0, scale, fallback).clamp(min=SMALLEST_SCALE).float()
