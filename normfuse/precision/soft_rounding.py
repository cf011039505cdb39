"""A weight that learns to round down or up (AdaRound, Nagel et al. 2020, arXiv 2004.10568)."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

import torch
from torch import Tensor

from normfuse.quant import RoundedWeight, scale_for_bias

__all__ = ["SoftlyRounded"]

STRETCH: Final = (-0.1, 1.1)
"""Where the sigmoid ends before it is clamped to 0 ... 1, so that both are reached."""


class SoftlyRounded:
    """A weight whose codes are ``floor(w / scale) + h``, with ``h`` of 0 ... 1 learned and rounded in the end.

    It starts as the float weight itself where that is not clipped. Scales and bias are learned beside it.
    """

    def __init__(self, start: RoundedWeight, weight: Tensor) -> None:
        self._start, kind = start, start.params.type
        self._shape = weight.shape
        steps = weight.detach() / start.params.granularity.spread(start.params.scale, weight.shape)
        self._floor = steps.floor().clamp(kind.minimum, kind.maximum - 1)
        low, high = STRETCH
        part = (steps - self._floor).clamp(0, 1)
        self.offset = torch.logit((part - low) / (high - low)).requires_grad_()
        self.log_scale = start.params.scale.log().requires_grad_()
        self.shift = None if start.bias is None else torch.zeros_like(start.bias).requires_grad_()

    def values(self) -> Tensor:
        """Return the values of the weight, with gradients."""
        scale = self._start.params.granularity.spread(self.log_scale.exp(), self._shape)
        return (self._floor + self._part()) * scale

    def bias(self) -> Tensor | None:
        """Return the bias, with gradients."""
        if self._start.bias is None or self.shift is None:
            return None
        return self._start.bias.detach() + self.shift * self._start.bias.detach().abs().mean().clamp(min=1e-3)

    def undecided(self, sharpness: float) -> Tensor:
        """Return the mean of ``1 - |2 h - 1|^sharpness``: 0 where every weight is rounded."""
        return 1 - (2 * self._part() - 1).abs().pow(sharpness).mean()

    def rounded(self, input_scale: float | None) -> RoundedWeight:
        """Return what was learned, behind an input of this scale (None: a float one)."""
        with torch.no_grad():
            bias, params = self.bias(), replace(self._start.params, scale=self.log_scale.exp())
            if bias is not None and input_scale is not None:
                params = scale_for_bias(params, input_scale=input_scale, bias=bias)
            codes = (self._floor + (self._part() >= 0.5)).to(params.type.torch_dtype)
            return RoundedWeight(codes=codes, params=params, bias=bias)

    def _part(self) -> Tensor:
        low, high = STRETCH
        return (self.offset.sigmoid() * (high - low) + low).clamp(0, 1)
