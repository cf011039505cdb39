"""Weights rounded one input after another, each error made good by the inputs still to come (GPTQ)."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from normfuse.quant.damped_root import damped_root, solve_by_root
from normfuse.quant.rounding_problem import RoundingProblem

__all__ = ["gptq_codes"]

BLOCK: Final = 128
"""Columns between two products with all columns that are done; a matter of speed alone."""


def gptq_codes(problem: RoundingProblem, *, damping: float = 0.01, activation_order: bool = True) -> Tensor:
    """Return codes of weights whose outputs are near the float model's, of little ``||X_q Q^T - X_f W^T||^2``.

    With ``lambda ||q - w||^2`` added and a lower triangular ``R R^T = H + lambda I``, the error of an output is, up to
    what no ``q`` changes,

        ||R^T (q - v)||^2     v = w + (H + lambda I)^-1 D w     D = X_q^T (X_f - X_q)

    where ``v`` is the best weight without a grid: completing the square is all there is to the correction for inputs
    that are already quantized. Columns are rounded from the last to the first, each to the nearest code of

        t_i = v_i + sum over j > i of (v_j - q_j) R_ji / R_ii

    which is the best place of ``q_i`` given those that are done, the others still being free. That is the update with
    the inverse Hessian in another order of the sums, without the inverse.

    Sources: Frantar et al. 2022 (arXiv 2210.17323); Chee et al. 2023 (arXiv 2307.13304), who prove the triangular form
    equal to it; Li et al. 2025 (arXiv 2504.02692) for the correction, which there moves a column's share to the
    columns after it, here to the best place among all. From few samples it learns chance: see ``shrink_drift``.

    Args:
        problem: the weights, their grid and their inputs' moments; it is not changed. Beside H one matrix of its size
            is made. Where its pull is 0, ``X_f`` is taken for ``X_q``: GPTQ as published.
        damping: lambda as a share of the mean squared input. Raised tenfold while the root fails.
        activation_order: whether inputs are rounded from the largest to the smallest instead of in their own order.

    Returns:
        Integers of the smallest type that holds the grid, [groups, rows, K]. Inputs that are always zero get the
        nearest.

    Raises:
        BadInput: no damping makes the Hessian positive definite.
    """
    order = _order(problem, activation_order)
    root, _ = damped_root(problem.gram, damping, order)
    problem = problem.with_columns(order)
    target = problem.weight + solve_by_root(root, problem.pull.mT).mT
    codes = _round_columns(problem, target, root.div_(root.diagonal(dim1=1, dim2=2)[:, None].clone()))
    return torch.empty_like(codes).scatter_(2, order[:, None].expand_as(codes), codes)


def _order(problem: RoundingProblem, by_activation: bool) -> Tensor:
    """Return the columns, the first to round last, [groups, K]."""
    curvature = problem.curvature
    if by_activation:
        return curvature.argsort(dim=1, descending=True, stable=True).flip(1)
    return torch.arange(curvature.shape[1], device=curvature.device).flip(0).expand_as(curvature)


def _round_columns(problem: RoundingProblem, target: Tensor, feedback: Tensor) -> Tensor:
    """Return the codes, [groups, rows, K]; ``feedback`` [groups, K, K] holds R_ji / R_ii at row j and column i."""
    codes: list[Tensor] = []
    error = torch.zeros_like(target)
    for end in range(target.shape[2], 0, -BLOCK):
        start = max(end - BLOCK, 0)
        wanted = target[:, :, start:end] + error[:, :, end:] @ feedback[:, end:, start:end]
        for column in range(end - 1, start - 1, -1):
            done = slice(column + 1, end)
            from_block = (error[:, :, done] @ feedback[:, done, column, None])[:, :, 0]
            codes.append(problem.codes_of(wanted[:, :, column - start] + from_block, column))
            error[:, :, column] = target[:, :, column] - problem.values_of(codes[-1], column)
    return torch.stack(codes[::-1], dim=2)
