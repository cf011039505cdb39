"""A weight that learns which codes it gets."""

from __future__ import annotations

import torch
from torch import Tensor

from normfuse.precision.straight_through import rounded
from normfuse.quant import QuantParams, RoundedWeight, quantize, scale_for_bias

__all__ = ["LearnedWeight"]


class LearnedWeight:
    """A weight that moves in units of its steps, its scales and its bias."""

    def __init__(self, start: RoundedWeight, weight: Tensor) -> None:
        self._start = start
        self._step = start.params.granularity.spread(start.params.scale, weight.shape)
        self._weight = weight.detach()
        self.offset = torch.zeros_like(self._weight).requires_grad_()
        self.log_scale = start.params.scale.log().requires_grad_()
        self.shift = None if start.bias is None else torch.zeros_like(start.bias).requires_grad_()

    def values(self) -> Tensor:
        """Return the values of the codes, with gradients."""
        kind = self._start.params.type
        scale = self._start.params.granularity.spread(self.log_scale.exp(), self._weight.shape)
        moved = (self._weight + self.offset * self._step) / scale
        return rounded(moved.clamp(kind.minimum, kind.maximum)) * scale

    def bias(self) -> Tensor | None:
        """Return the bias, with gradients."""
        if self._start.bias is None or self.shift is None:
            return None
        return self._start.bias.detach() + self.shift * self._start.bias.detach().abs().mean().clamp(min=1e-3)

    def rounded(self, input_scale: float | None) -> RoundedWeight:
        """Return what was learned, behind an input of this scale (None: a float one)."""
        with torch.no_grad():
            bias, start = self.bias(), self._start.params
            params = QuantParams(
                scale=self.log_scale.exp(),
                zero_point=start.zero_point,
                type=start.type,
                granularity=start.granularity,
            )
            if bias is not None and input_scale is not None:
                params = scale_for_bias(params, input_scale=input_scale, bias=bias)
            moved = self._weight + self.offset * self._step
            return RoundedWeight(codes=quantize(moved, params), params=params, bias=bias)
