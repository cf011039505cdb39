"""``normfuse::affine``: one per-channel ``scale * x + shift`` with its constants in float64."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["affine", "along"]


def along(vector: Tensor, axis: int, rank: int) -> Tensor:
    """Return ``vector`` shaped to broadcast along ``axis`` of a tensor of ``rank`` axes."""
    return vector.reshape([-1 if index == axis else 1 for index in range(rank)])


@torch.library.custom_op("normfuse::affine", mutates_args=())
def affine(x: Tensor, scale: Tensor, shift: Tensor, axis: int) -> Tensor:
    """Return ``scale * x + shift`` along ``axis`` (ours).

    ``scale`` and ``shift`` are float64 vectors of the axis' size, or of size 1 (the same for every
    channel); they are rounded once, to the type of ``x``.
    """
    wide = along(scale.to(x.dtype), axis, x.ndim)
    return x * wide + along(shift.to(x.dtype), axis, x.ndim)


@affine.register_fake
def _(x: Tensor, scale: Tensor, shift: Tensor, axis: int) -> Tensor:
    return torch.empty_like(x)
