"""Rounding whose gradient is that of the identity."""

from __future__ import annotations

from torch import Tensor

__all__ = ["rounded", "straight_through"]


def rounded(x: Tensor) -> Tensor:
    """Round; the gradient passes as if it were the identity."""
    return straight_through(x, x.round())


def straight_through(x: Tensor, moved: Tensor) -> Tensor:
    """Return ``moved``; the gradient goes to ``x`` as if it were ``x``."""
    return x + (moved - x).detach()
