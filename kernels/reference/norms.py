"""Layer and RMS norm of integers: exact sums, an exact square root, one reciprocal per row.

A norm does not care about the scale of its input. With C channels, T the sum of a row and Q the sum of its squares,

    (x - mean) / sqrt(variance + eps) = (C x - T) / sqrt(C Q - T^2 + epsilon),    epsilon = eps (C / scale)^2

and everything on the right but the root is an exact integer (ours). "I-BERT" (Kim et al., 2021, arXiv 2101.01321) and
"I-ViT" (Li and Gu, 2022, arXiv 2207.01405) round the mean first and stop Newton's iteration early.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from normfuse.kernels.reference.rescaling import rescale

__all__ = ["FRACTION", "deviations", "int_layer_norm", "int_rms_norm", "over_root", "power", "square_root"]

FRACTION: Final = 20
"""Bits behind the point of what is normalized, before it is rescaled."""

ROOT_BITS: Final = 31
"""Bits of the root: what is rooted is brought to 61 or 62 bits first."""


def int_layer_norm(
    x: Tensor,
    bias: Tensor,
    multiplier: Tensor,
    epsilon: int,
    shift: int,
    zero_point: int,
    minimum: int,
    maximum: int,
) -> Tensor:
    """Return the codes of a layer norm over the last axis, with a scale and a shift for every channel.

    Args:
        x: int8 or int16 [..., channels], zero point 0.
        bias: int32 [channels], or [1] for all, at 2^-20: beta / gamma.
        multiplier: int32 [channels], or [1]: gamma over the result's scale, times 2^(shift - 20).
        epsilon: ``eps (channels / scale of x)^2``, 1 or more.
        shift: see ``rescale``.
        zero_point: see ``rescale``.
        minimum: see ``rescale``.
        maximum: see ``rescale``.
    """
    normal = over_root(deviations(x, is_centred=True), power(x, epsilon, is_centred=True))
    return rescale(normal, bias, multiplier, shift, zero_point, minimum, maximum)


def int_rms_norm(
    x: Tensor,
    bias: Tensor,
    multiplier: Tensor,
    epsilon: int,
    shift: int,
    zero_point: int,
    minimum: int,
    maximum: int,
) -> Tensor:
    """Return the codes of an RMS norm over the last axis, with a scale and a shift for every channel.

    Args:
        x: as for ``int_layer_norm``.
        bias: as for ``int_layer_norm``.
        multiplier: as for ``int_layer_norm``.
        epsilon: as for ``int_layer_norm``.
        shift: see ``rescale``.
        zero_point: see ``rescale``.
        minimum: see ``rescale``.
        maximum: see ``rescale``.
    """
    normal = over_root(deviations(x, is_centred=False), power(x, epsilon, is_centred=False))
    return rescale(normal, bias, multiplier, shift, zero_point, minimum, maximum)


def deviations(x: Tensor, *, is_centred: bool) -> Tensor:
    """Return int64 ``C x``, or ``C x - T``: C times what x [..., C] is away from 0, or from its row's mean."""
    return x.shape[-1] * x.to(torch.int64) - _total(x, is_centred)


def power(x: Tensor, epsilon: int, *, is_centred: bool) -> Tensor:
    """Return int64 ``C Q + epsilon``, or ``C Q - T^2 + epsilon``, [..., 1]: the mean of squared deviations."""
    wide, total = x.to(torch.int64), _total(x, is_centred)
    return x.shape[-1] * (wide * wide).sum(-1, keepdim=True) - total * total + epsilon


def _total(x: Tensor, is_centred: bool) -> Tensor:
    return int(is_centred) * x.to(torch.int64).sum(-1, keepdim=True)


def square_root(x: Tensor) -> Tensor:
    """Return the largest integer whose square is not above x, for 0 <= x < 2^62."""
    root = x.double().sqrt().to(torch.int64)  # off by one at most: float64 has 53 bits, the root 31
    root = torch.where(root * root > x, root - 1, root)
    return torch.where((root + 1) * (root + 1) <= x, root + 1, root)


def over_root(x: Tensor, power: Tensor) -> Tensor:
    """Return ``x / sqrt(power)`` with ``FRACTION`` bits behind the point, for a power of 1 ... 2^62 - 1 per row."""
    doublings = _doublings(power)
    root = square_root(power << (2 * doublings))  # 2^30 ... 2^31 - 1
    reciprocal = ((1 << (2 * ROOT_BITS - 1)) + (root >> 1)) // root
    shift = 2 * ROOT_BITS - 1 - FRACTION - doublings
    return (x * reciprocal + (1 << (shift - 1))) >> shift


def _doublings(power: Tensor) -> Tensor:
    """Return how often a number can be made four times larger below 2^62."""
    limits = torch.tensor([1 << (2 * count) for count in range(1, ROOT_BITS)], device=power.device)
    return (power < limits).sum(-1, keepdim=True)
