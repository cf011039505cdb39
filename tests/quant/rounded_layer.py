"""The two ways to round a layer, called on a weight with its grid and its inputs' moments."""

from __future__ import annotations

from torch import Tensor

from normfuse.quant import InputMoments, QuantParams, RoundingProblem, descended, gptq_codes, quantize

__all__ = ["by_descent", "by_gptq"]


def by_gptq(
    weight: Tensor,
    params: QuantParams,
    moments: InputMoments,
    *,
    damping: float = 0.01,
    activation_order: bool = True,
    asymmetric_correction: bool = True,
) -> Tensor:
    """Return GPTQ's codes, in the weight's shape."""
    problem = RoundingProblem.of(weight, params, moments, asymmetric_correction=asymmetric_correction)
    return gptq_codes(problem, damping=damping, activation_order=activation_order).reshape(weight.shape)


def by_descent(
    weight: Tensor, params: QuantParams, moments: InputMoments, *, start: Tensor | None = None, sweeps: int = 4
) -> Tensor:
    """Return the codes after coordinate descent from these, or from the nearest, in the weight's shape."""
    problem = RoundingProblem.of(weight, params, moments)
    start = quantize(weight.detach().double(), params) if start is None else start
    return descended(problem, start.reshape(problem.weight.shape), sweeps=sweeps).reshape(weight.shape)
