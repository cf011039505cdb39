"""A weight that learns to round down or up (AdaRound, Nagel et al. 2020, arXiv 2004.10568)."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from normfuse.precision.learned_weight import LearnedWeight
from normfuse.quant import QuantParams, RoundedWeight

__all__ = ["SoftlyRounded"]

STRETCH: Final = (-0.1, 1.1)
"""Where the sigmoid ends before it is clamped to 0 ... 1, so that both are reached."""


class SoftlyRounded(LearnedWeight):
    """A weight whose codes are ``zero + floor(w / scale) + h``, with ``h`` of 0 ... 1 learned and rounded in the end.

    It starts as the float weight itself where that is not clipped. Scales and bias are learned beside it.
    """

    offset: Tensor

    def __init__(self, start: RoundedWeight, weight: Tensor) -> None:
        super().__init__(start, weight)
        kind = start.params.type
        steps = weight.detach() / start.params.granularity.spread(start.params.scale, weight.shape)
        self._floor = steps.floor().clamp(kind.minimum - self._zero, kind.maximum - 1 - self._zero)
        low, high = STRETCH
        part = (steps - self._floor).clamp(0, 1)
        self.offset = torch.logit((part - low) / (high - low)).requires_grad_()

    def values(self) -> Tensor:
        """Return the values of the weight, with gradients."""
        return (self._floor + self._part()) * self._scale()

    def undecided(self, sharpness: float) -> Tensor:
        """Return the mean of ``1 - |2 h - 1|^sharpness``: 0 where every weight is rounded."""
        return 1 - (2 * self._part() - 1).abs().pow(sharpness).mean()

    def _codes(self, params: QuantParams) -> Tensor:
        return (self._floor + (self._part() >= 0.5) + self._zero).to(params.type.torch_dtype)

    def _part(self) -> Tensor:
        low, high = STRETCH
        return (self.offset.sigmoid() * (high - low) + low).clamp(0, 1)
