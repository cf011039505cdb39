"""The scale of an activation's codes with gradients, and the zero point where they have one."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from normfuse.precision.straight_through import rounded, straight_through
from normfuse.quant import LogarithmicParams, QuantParams
from normfuse.quant.logarithm import nearest_levels

__all__ = ["LearnedActivation", "LearnedLogarithm", "LearnedUniform", "learned_activation"]


def learned_activation(params: QuantParams | LogarithmicParams, *, is_symmetric: bool = False) -> LearnedActivation:
    """Return what learns these parameters; the zero point of a symmetric quantizer stays."""
    if isinstance(params, QuantParams):
        return LearnedUniform(params, is_symmetric=is_symmetric)
    return LearnedLogarithm(params)


class LearnedUniform:
    """Scales and zero points with gradients; scales are learned as logarithms and stay positive."""

    def __init__(self, params: QuantParams, *, is_symmetric: bool) -> None:
        self._start = params
        self.log_scale = params.scale.log().requires_grad_()
        self.zero: Tensor | None = None if is_symmetric else params.zero_point.float().requires_grad_()

    def __call__(self, x: Tensor) -> Tensor:
        """Return the values that ``x`` moves to."""
        kind, on = self._start.type, self._start.granularity
        scale = on.spread(self.log_scale.exp(), x.shape)
        moved = self._start.zero_point.float() if self.zero is None else rounded(self.zero)
        zero = on.spread(moved.clamp(kind.minimum, kind.maximum), x.shape)
        codes = rounded((x / scale + zero).clamp(kind.minimum, kind.maximum))
        return (codes - zero) * scale

    def params(self) -> QuantParams:
        """Return what was learned."""
        kind, found = self._start.type, replace(self._start, scale=self.log_scale.detach().exp())
        if self.zero is None:
            return found
        return replace(found, zero_point=self.zero.detach().round().clamp(kind.minimum, kind.maximum).int())


class LearnedLogarithm:
    """Scales of logarithmic codes with gradients."""

    zero: Tensor | None = None

    def __init__(self, params: LogarithmicParams) -> None:
        self._start, self._levels = params, params.levels
        self.log_scale = params.scale.log().requires_grad_()

    def __call__(self, x: Tensor) -> Tensor:
        """Return the values that ``x`` moves to; above the scale only the scale has a gradient."""
        scale = self._start.granularity.spread(self.log_scale.exp(), x.shape)
        steps = (x / scale).clamp(0, 1)
        return straight_through(steps, self._levels[nearest_levels(steps.detach(), self._levels)]) * scale

    def params(self) -> LogarithmicParams:
        """Return what was learned."""
        return replace(self._start, scale=self.log_scale.detach().exp())


LearnedActivation = LearnedUniform | LearnedLogarithm
