"""How a weight becomes integers while it is trained: by a scale that stays, or by one that follows it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from normfuse.quant import QuantParams, RoundedWeight, quantize, scale_for_bias

__all__ = ["WeightRounding", "distance_to_border"]

HALF = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightRounding:
    """What rounds the weight of one linear map, whatever it has become.

    With a ``factor`` the scale of output o is ``factor[o] * mean |W[o]|`` of the weights as they are now, and no
    gradient goes through it: the statistical scale of "OFQ" (StatsQ; Liu et al., 2023, arXiv 2302.02210). Published is
    a factor of 2 / 2^(bits - 1) for a grid without a zero, -n + 1/2 ... n - 1/2 steps, and a training from the start
    at 2 to 4 bits. Ours are codes around zero, as the engine has them, and the factor that calibration had chosen: the
    grid of least squared error over the mean magnitude then. So nothing is different before the first step, at any
    number of bits, and from there scales grow and shrink as their weights do.

    Attributes:
        calibrated: codes and scales as training finds them.
        input_scale: the scale of the codes that the weight meets; biases are held at the product of both.
        factor: float64 [out], 0 where all weights were 0 and the scale stays; None: all scales stay.
    """

    calibrated: RoundedWeight
    input_scale: float | None
    factor: Tensor | None = None

    @classmethod
    def of(cls, calibrated: RoundedWeight, weight: Tensor, *, input_scale: float | None, follows: bool) -> Self:
        """Return what rounds ``weight``, [out, ...], to the calibrated codes as long as it is not trained."""
        found = cls(calibrated=calibrated, input_scale=input_scale)
        if not follows:
            return found
        mean = _mean_magnitude(weight)
        factor = torch.where(mean > 0, calibrated.params.scale.double() / mean, 0.0)
        return replace(found, factor=factor)

    def params(self, weight: Tensor, bias: Tensor) -> QuantParams:
        """Return scales for the weight [out, ...] and beside it the bias [out], which has to fit an int32.

        Raises:
            UsageError: a scale is no number, because a weight is none.
        """
        known = self.calibrated.params
        if self.factor is None:
            return known
        scale = (self.factor.to(weight.device) * _mean_magnitude(weight)).float()
        found = replace(known, scale=torch.where(scale == 0, known.scale.to(scale.device), scale))
        if self.input_scale is None:
            return found
        return scale_for_bias(found, input_scale=self.input_scale, bias=bias.detach())

    def rounded(self, weight: Tensor, bias: Tensor) -> RoundedWeight:
        """Return weight and bias as the engine holds them."""
        params = self.params(weight, bias)
        codes = quantize(weight.detach().float(), params)
        return RoundedWeight(codes=codes, params=params, bias=bias.detach().float())


def distance_to_border(weight: Tensor, params: QuantParams) -> Tensor:
    """Return how far every weight is from the border between two codes, in codes: 0 to 1/2, in the weight's shape."""
    steps = weight.detach() / params.granularity.spread(params.scale.to(weight), weight.shape)
    return (steps - steps.floor() - HALF).abs()


def _mean_magnitude(weight: Tensor) -> Tensor:
    return weight.detach().double().abs().flatten(1).mean(1)
