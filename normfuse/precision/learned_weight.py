"""A weight that learns which codes it gets."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace

import torch
from torch import Tensor

from normfuse.precision.straight_through import rounded
from normfuse.quant import QuantParams, RoundedWeight, quantize, scale_for_bias
from normfuse.quant.rounding import to_values

__all__ = ["KeptCodes", "LearnedWeight", "MovedWeight"]


class LearnedWeight(ABC):
    """Scales and bias that are learned, and an ``offset`` that says which codes the weight gets, if they are."""

    offset: Tensor | None = None

    def __init__(self, start: RoundedWeight, weight: Tensor) -> None:
        self._start, self._shape = start, weight.shape
        self._zero = start.params.granularity.spread(start.params.zero_point, weight.shape)
        self.log_scale = start.params.scale.log().requires_grad_()
        self.shift = None if start.bias is None else torch.zeros_like(start.bias).requires_grad_()

    @abstractmethod
    def values(self) -> Tensor:
        """Return the values of the weight, with gradients."""

    @abstractmethod
    def _codes(self, params: QuantParams) -> Tensor:
        """Return the codes that were learned, for these parameters."""

    def bias(self) -> Tensor | None:
        """Return the bias, with gradients."""
        if self._start.bias is None or self.shift is None:
            return None
        return self._start.bias.detach() + self.shift * self._start.bias.detach().abs().mean().clamp(min=1e-3)

    def rounded(self, input_scale: float | None) -> RoundedWeight:
        """Return what was learned, behind an input of this scale (None: a float one)."""
        with torch.no_grad():
            bias, params = self.bias(), replace(self._start.params, scale=self.log_scale.exp())
            if bias is not None and input_scale is not None:
                params = scale_for_bias(params, input_scale=input_scale, bias=bias)
            return RoundedWeight(codes=self._codes(params), params=params, bias=bias)

    def _scale(self) -> Tensor:
        """Return the scales beside the weight, with gradients."""
        return self._start.params.granularity.spread(self.log_scale.exp(), self._shape)


class KeptCodes(LearnedWeight):
    """A weight whose codes stay: what is learned is an affine of every output, in the dequantization."""

    def __init__(self, start: RoundedWeight, weight: Tensor) -> None:
        super().__init__(start, weight)
        self._steps = to_values(start.codes, torch.ones_like(weight), self._zero)

    def values(self) -> Tensor:
        """Return the values of the codes, with gradients."""
        return self._steps * self._scale()

    def _codes(self, params: QuantParams) -> Tensor:
        return self._start.codes


class MovedWeight(LearnedWeight):
    """A weight that moves in units of its first steps; rounding it has the gradient of the identity."""

    offset: Tensor

    def __init__(self, start: RoundedWeight, weight: Tensor) -> None:
        super().__init__(start, weight)
        self._weight, self._step = weight.detach(), self._scale().detach()
        self.offset = torch.zeros_like(self._weight).requires_grad_()

    def values(self) -> Tensor:
        """Return the values of the codes, with gradients."""
        kind, scale = self._start.params.type, self._scale()
        return rounded((self._moved() / scale).clamp(kind.minimum - self._zero, kind.maximum - self._zero)) * scale

    def _codes(self, params: QuantParams) -> Tensor:
        return quantize(self._moved(), params)

    def _moved(self) -> Tensor:
        return self._weight + self.offset * self._step
