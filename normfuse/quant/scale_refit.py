"""Scales moved to where the error of the outputs is least, the codes being fixed."""

from __future__ import annotations

import torch
from torch import Tensor

from normfuse.errors import UsageError
from normfuse.quant.granularity import PerChannel, PerGroup
from normfuse.quant.hessian import InputMoments
from normfuse.quant.parameters import SMALLEST_SCALE, QuantParams
from normfuse.quant.rounding import to_values
from normfuse.quant.rounding_problem import RoundingProblem

__all__ = ["refit_scale"]


def refit_scale(weight: Tensor, codes: Tensor, params: QuantParams, moments: InputMoments) -> QuantParams:
    """Return ``params`` with the scales at which ``codes`` have the least error ``||X_q Q^T - X_f W^T||^2``.

    With one scale per channel it is ``s = <X_f w, X_q u> / ||X_q u||^2`` for the integers ``u`` less their zero point;
    groups move one after another, each to its best place beside the others. A scale stays where a move to the nearest
    float32 would not be better or not positive.

    Source: Beacon, Zhang and Saab 2025 (arXiv 2508.20293), whose scale per channel is this quotient; groups are ours.

    Args:
        weight: any float type, [out, ...].
        codes: integers of the same shape.
        params: of the codes, per channel on axis 0 or per group on another axis.
        moments: of the inputs; the weight's other axes, in order, are its K.

    Raises:
        UsageError: the shapes do not fit, or outputs share scales.
    """
    match params.granularity:
        case PerChannel(axis=0):
            pass
        case PerGroup(axis=axis) if axis > 0:
            pass
        case _:
            raise UsageError(f"outputs that share scales ({params.granularity})", expected="scales of their own")
    problem = RoundingProblem.of(weight, params, moments)
    shape, device = problem.weight.shape, problem.weight.device
    steps = to_values(codes.to(device).reshape(shape), torch.ones_like(problem.scale), problem.zero_point)
    gradient = problem.gradient(steps * problem.scale)
    scale = params.scale.to(device).reshape(*shape[:2], -1)
    owners = _owners(params, weight.shape).to(device)
    refitted = [
        _refit(problem, steps, gradient, scale[:, :, owner], (owners == owner).nonzero()[:, 0])
        for owner in range(scale.shape[2])
    ]
    new = torch.stack(refitted, dim=2).reshape(params.scale.shape).to(params.scale.device)
    return QuantParams(scale=new, zero_point=params.zero_point, type=params.type, granularity=params.granularity)


def _owners(params: QuantParams, shape: torch.Size) -> Tensor:
    """Return which of an output's scales each of its weights has, [K]; it is the same for all outputs."""
    positions = torch.arange(params.scale.numel()).reshape(params.scale.shape)
    return params.granularity.spread(positions, shape).expand(shape)[0].flatten()


def _refit(problem: RoundingProblem, steps: Tensor, gradient: Tensor, scale: Tensor, columns: Tensor) -> Tensor:
    """Return the better of one scale per row, float32 [groups, rows], and its lowest point; move the gradient along."""
    taken = steps[:, :, columns]
    change = taken @ problem.gram[:, columns]
    slope = (taken * gradient[:, :, columns]).sum(dim=2)
    curvature = (change[:, :, columns] * taken).sum(dim=2)
    lowest = (scale.double() - slope / curvature).float()  # 0 / 0 where all codes are zero or all inputs dead
    move = lowest.double() - scale.double()
    is_better = (move * (2 * slope + curvature * move) < 0) & (lowest >= SMALLEST_SCALE)
    gradient += torch.where(is_better, move, 0.0)[:, :, None] * change
    return torch.where(is_better, lowest, scale)
