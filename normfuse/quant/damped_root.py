"""Triangular roots of Gram matrices that may be singular."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from normfuse.errors import BadInput
from normfuse.quant.reordering import reordered

__all__ = ["damped_root", "solve_by_root"]

ATTEMPTS: Final = 8
"""How often the damping is raised tenfold: a Gram matrix, being a sum of squares, needs none or few."""

LEAST_RETRY: Final = 1e-10
"""The damping tried after none."""


def damped_root(gram: Tensor, damping: float, order: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return lower triangular ``R`` with ``R R^T = H + lambda I``, and lambda. R is the only matrix that is made.

    Inputs that were never seen, with a diagonal of 0, stand apart from all others; any positive diagonal will do, and
    theirs is at least 1.

    Args:
        gram: H, float64 [groups, K, K], symmetric, positive semidefinite but for rounding.
        damping: lambda as a share of the mean of the diagonal, zeros left out. Raised tenfold while the root fails.
        order: [groups, K], in which the root takes the rows and columns of H; None for their own.

    Returns:
        [groups, K, K], stored column by column, and [groups].

    Raises:
        BadInput: no damping makes the matrix positive definite.
    """
    diagonal = gram.diagonal(dim1=1, dim2=2)
    diagonal = diagonal if order is None else diagonal.gather(1, order)
    is_live = diagonal > 0
    mean = diagonal.sum(dim=1) / is_live.sum(dim=1).clamp(min=1)
    share = torch.full_like(mean, damping)
    for _ in range(ATTEMPTS + 1):
        added = (share * mean)[:, None] + (~is_live).double()
        root = reordered(gram, order)
        root.diagonal(dim1=1, dim2=2).add_(added)
        failed = torch.empty_like(mean, dtype=torch.int32)
        torch.linalg.cholesky_ex(root, out=(root, failed))
        if not bool(failed.any()):
            return root, share * mean
        share = torch.where(failed > 0, (10 * share).clamp(min=LEAST_RETRY), share)
    raise BadInput(
        "the inputs' second moments are not positive definite",
        where=f"damped by {float(share.max()) / 10:g} of their mean",
        expected="sums of products of finite inputs",
        hint="gather the moments of this layer again",
    )


def solve_by_root(root: Tensor, right: Tensor) -> Tensor:
    """Return ``(R R^T)^-1 right``, [groups, K, n]; unlike ``torch.cholesky_solve`` it makes no copy of the root."""
    half = torch.linalg.solve_triangular(root, right, upper=False)
    found: Tensor = torch.linalg.solve_triangular(root.mT, half, upper=True)
    return found
