"""Scales and shifts per channel that make the channels of a tensor alike, from what was seen of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Self

import torch
from torch import Tensor

__all__ = ["ChannelScales", "SeenChannels", "channel_scales"]

EXPONENTS: Final = ((0.25, False), (0.5, False), (0.5, True), (0.75, False), (0.75, True), (1.0, False))
"""Powers ``a`` of a channel's size that it is divided by, and whether it is multiplied by ``1 - a`` of its weights'."""

ALIVE: Final = 1e-6
"""Channels smaller than this part of the largest say nothing about a scale."""


@dataclass(slots=True)
class SeenChannels:
    """What is known of the channels of a tensor and of the weights that read them; float64 [channels] each."""

    low: Tensor
    high: Tensor
    total: Tensor
    squares: Tensor
    weight: Tensor
    count: int = 0

    @classmethod
    def of(cls, channels: int) -> Self:
        """Return what is known of channels that were never seen."""
        zero = torch.zeros(channels, dtype=torch.float64)
        return cls(zero + torch.inf, zero - torch.inf, zero, zero, zero)

    def see(self, x: Tensor, axis: int) -> None:
        """Take in a tensor with its channels along ``axis``."""
        rows = x.double().movedim(axis, 0).flatten(1)
        self.low, self.high = torch.minimum(self.low, rows.amin(1)), torch.maximum(self.high, rows.amax(1))
        self.total, self.squares = self.total + rows.sum(1), self.squares + rows.square().sum(1)
        self.count += rows.shape[1]


@dataclass(frozen=True, slots=True)
class ChannelScales:
    """``scale * x + shift`` per channel, float64 [channels], and in words where they come from."""

    label: str
    scale: Tensor
    shift: Tensor


def channel_scales(seen: SeenChannels, groups: Tensor) -> Iterator[ChannelScales]:
    """Yield what is worth trying: channels centred or not, divided by powers of their size.

    Powers of the largest magnitude that share out between activations and weights are SmoothQuant's (Xiao et al.,
    2022, arXiv 2211.10438, equation 4); the whole centred range is RepQ-ViT's (Li et al., 2022, arXiv 2212.08254,
    section 3.2). RMS and deviation count where ranges are clipped (ours).

    Args:
        seen: the channels.
        groups: [channels], int64: channels of one group get the geometric mean of their scales and one shift.
    """
    zero = torch.zeros_like(seen.total)
    if not seen.count:
        return
    mean, power = seen.total / seen.count, seen.squares / seen.count
    sizes = {
        "largest": (torch.maximum(-seen.low, seen.high), zero),
        "largest, centred": ((seen.high - seen.low) / 2, (seen.low + seen.high) / 2),
        "rms": (power.sqrt(), zero),
        "deviation, centred": ((power - mean.square()).clamp(min=0).sqrt(), mean),
    }
    for name, (size, centre) in sizes.items():
        for exponent, shares in ((0.0, False), *EXPONENTS) if centre.any() else EXPONENTS:
            scale = _scale(size, seen.weight if shares else None, exponent, groups)
            label = f"{name} ^ {exponent:g}" + (f", weights ^ {1 - exponent:g}" if shares else "")
            yield ChannelScales(label, scale, _averaged(-centre * scale, groups))


def _scale(size: Tensor, weight: Tensor | None, exponent: float, groups: Tensor) -> Tensor:
    """Return ``weight^(1 - a) / size^a``, of geometric mean 1; channels that are next to dead stay as they are."""
    lives = size > ALIVE * size.max()
    if weight is not None:
        lives = lives & (weight > ALIVE * weight.max())
    if not lives.any():
        return torch.ones_like(size)
    logarithm = -exponent * torch.where(lives, size, 1.0).log()
    if weight is not None:
        logarithm = logarithm + (1 - exponent) * torch.where(lives, weight, 1.0).log()
    logarithm = torch.where(lives, logarithm - logarithm[lives].mean(), 0.0)
    return _averaged(logarithm, groups).exp()


def _averaged(vector: Tensor, groups: Tensor) -> Tensor:
    """Return the mean of every group, for each of its channels."""
    sums = torch.zeros_like(vector).index_add_(0, groups, vector)
    counts = torch.zeros_like(vector).index_add_(0, groups, torch.ones_like(vector))
    return sums[groups] / counts[groups]
