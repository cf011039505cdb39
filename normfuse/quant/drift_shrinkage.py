"""The part of the inputs' error that rounding can make good on other samples too."""

from __future__ import annotations

from copy import copy
from typing import Final

import torch
from torch import Tensor

from normfuse.quant.damped_root import damped_root, solve_by_root
from normfuse.quant.hessian import InputMoments

__all__ = ["shrink_drift"]

SLICE: Final = 256
"""Columns of the drift that are fitted at once: beside H, D and one root little else is held."""


def shrink_drift(moments: InputMoments, *, damping: float = 0.01) -> InputMoments:
    """Return the moments with ``D = X_q^T (X_f - X_q)`` scaled to what is more than chance.

    Correcting for the inputs' error is a regression of ``E = X_f - X_q`` on ``X_q``, with as many coefficients as
    inputs: from few samples it fits noise, and the layer gets worse on others. With the regression's smoother
    ``S = X_q (H + lambda I)^-1 X_q^T`` the scale of its result that is best on the same inputs with fresh noise is

        c = (tr E^T S E - K s^2 tr S) / tr E^T S^2 E      K s^2 = ||E - S E||^2 / tr (I - S)^2

    estimated without bias, here one per group and cut to 0 ... 1. All of it follows from the moments:

        tr S = tr H M,  tr S^2 = tr (H M)^2,  tr E^T S E = tr D^T M D,  tr E^T S^2 E = tr D^T M H M D

    for ``M = (H + lambda I)^-1``. Ours, after Stein (Mallows 1973 for the count of free coefficients). Samples that are
    alike (neighbouring pixels, tokens of one image) count as more than they are worth, and c is then too large.

    Args:
        moments: not changed; all but the drift is shared with what is returned.
        damping: lambda as a share of the mean squared input, as it will be when the weights are rounded.

    Raises:
        BadInput: no damping makes the Gram matrix positive definite.
    """
    shrunk = copy(moments)
    if moments.drift is None:
        return shrunk
    root, added = damped_root(moments.gram, damping)
    kept = squares = torch.zeros_like(added)
    for drift in torch.split(moments.drift, SLICE, dim=2):
        fitted = solve_by_root(root, drift)
        kept = kept + (fitted * drift).sum(dim=(1, 2))
        squares = squares + fitted.square().sum(dim=(1, 2))
    length = kept - added * squares  # H M D = D - lambda M D
    freedom, squared = _traces(root, added, moments.gram.diagonal(dim1=1, dim2=2) > 0)
    del root
    unexplained = (moments.square_drift - 2 * kept + length).clamp(min=0)
    noise = unexplained / (moments.count - 2 * freedom + squared).clamp(min=1)
    share = torch.where(length > 0, (kept - noise * freedom) / length, 0.0).clamp(0, 1)
    shrunk.drift = moments.drift * share[:, None, None]
    return shrunk


def _traces(root: Tensor, added: Tensor, is_live: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``tr S`` and ``tr S^2``, [groups], of ``H M = I - lambda M``; inputs never seen have no part in them.

    The root is overwritten.
    """
    inverse = torch.cholesky_inverse(root, out=root)
    diagonal = inverse.diagonal(dim1=1, dim2=2)
    count, trace = is_live.sum(dim=1), (diagonal * is_live).sum(dim=1)
    square = torch.linalg.vector_norm(inverse, dim=(1, 2)).square() - (diagonal * ~is_live).square().sum(dim=1)
    return count - added * trace, count - 2 * added * trace + added.square() * square
