"""Codes moved one input at a time to where the error of the outputs is least."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from normfuse.quant.rounding import to_values
from normfuse.quant.rounding_problem import RoundingProblem

__all__ = ["descended"]

BLOCK: Final = 128
"""Columns between two updates of the whole gradient; a matter of speed alone."""

SMALLEST: Final = 2.0**-1022
"""The smallest normal float64, divided by in place of 0."""


def descended(problem: RoundingProblem, start: Tensor, *, sweeps: int = 4) -> Tensor:
    """Return codes of no greater error ``||X_q Q^T - X_f W^T||^2`` than those of the start.

    As a function of one code alone the error is a parabola, so the best code is the nearest to its lowest point

        q_i - g_i / H_ii     g = H (q - w) - D w

    and a sweep goes once through all inputs, those of large ``||W_i|| ||X_i||`` first, and keeps a code unless another
    is better. Only the Gram matrix is touched. Inputs that are always zero keep their codes.

    Source: COMQ, Zhang et al. 2024 (arXiv 2403.07134). Ours are the Gram matrix, the inputs' own error, and one order
    for all outputs, so that a step is one column.

    Args:
        problem: the weights, their grid and their inputs' moments; it is not changed.
        start: codes to improve, such as those of GPTQ, integers [groups, rows, K]; they are not changed.
        sweeps: how many at most; it ends early when nothing moves.

    Returns:
        The start's type and shape.
    """
    order = (problem.weight.norm(dim=1) * problem.curvature.sqrt()).argsort(dim=1, descending=True, stable=True)
    along = order[:, None].expand_as(problem.weight)
    codes = start.gather(2, along)
    problem = problem.ordered(order)
    gradient = problem.gradient(to_values(codes, problem.scale, problem.zero_point))
    for _ in range(sweeps):
        if not _sweep(problem, codes, gradient):
            break
    return torch.empty_like(codes).scatter_(2, along, codes)


def _sweep(problem: RoundingProblem, codes: Tensor, gradient: Tensor) -> bool:
    """Move codes and gradient, [groups, rows, K], in place; return whether any code moved."""
    has_moved = False
    for start in range(0, codes.shape[2], BLOCK):
        block = slice(start, start + BLOCK)
        moves = torch.zeros_like(gradient[:, :, block])
        for index in range(moves.shape[2]):
            column = start + index
            inside = (moves[:, :, :index] @ problem.gram[:, start:column, column, None])[:, :, 0]
            code, move = _step(problem, codes[:, :, column], gradient[:, :, column] + inside, column)
            codes[:, :, column], moves[:, :, index] = code, move
        gradient += moves @ problem.gram[:, block]
        has_moved = has_moved or bool(moves.any())
    return has_moved


def _step(problem: RoundingProblem, code: Tensor, gradient: Tensor, column: int) -> tuple[Tensor, Tensor]:
    """Return the better of one column's codes and their nearest to the lowest point, and how far the values move."""
    curvature = problem.curvature[:, column, None]
    value = problem.values_of(code, column)
    nearest = problem.codes_of(value - gradient / curvature.clamp(min=SMALLEST), column)
    move = problem.values_of(nearest, column) - value
    is_better = move * (2 * gradient + curvature * move) < 0
    return torch.where(is_better, nearest, code), torch.where(is_better, move, 0.0)
