"""RMSNorm and CRMSNorm: what layer norm is on tokens without a mean, whole and with one channel less."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from normfuse.errors import UsageError

__all__ = ["CRMSNorm", "RMSNorm", "compress_channels", "expand_channels"]


class RMSNorm(nn.Module):
    """``x / sqrt(mean(x * x) + eps)`` over the last axis of (..., channels).

    "Pre-RMSNorm and Pre-CRMSNorm Transformers: Equivalent and Efficient Pre-LN Transformers" (Jiang et al., 2023,
    arXiv 2305.14858). On tokens whose channels sum to zero it is layer norm without weight and bias, with the same
    ``eps``. By default it has no weight, as in the paper: what a layer norm had learned belongs to its readers.

    Args:
        channels: size of the last axis.
        eps: added to the mean square.
        has_weight: whether to multiply by one learned number per channel.
    """

    def __init__(self, channels: int, *, eps: float = 1e-5, has_weight: bool = False) -> None:
        super().__init__()
        self.channels, self.eps = channels, eps
        self.weight = nn.Parameter(torch.ones(channels)) if has_weight else None

    def extra_repr(self) -> str:
        """Return the options, for ``print(model)``."""
        return f"{self.channels}, eps={self.eps}, has_weight={self.weight is not None}"

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` (..., channels) normalized."""
        normed = _over_root(x, _wide(x).square().mean(dim=-1, keepdim=True) + self.eps)
        return normed if self.weight is None else normed * self.weight


class CRMSNorm(nn.Module):
    """`RMSNorm` of tokens without a mean, of which only the first ``channels - 1`` are kept.

    "Pre-RMSNorm and Pre-CRMSNorm Transformers" (as for `RMSNorm`). The channel left out is minus the sum of the
    others, so with z of (..., channels - 1)::

        z / sqrt((sum(z * z) + sum(z) ** 2) / channels + eps)

    is the first ``channels - 1`` of the RMSNorm of the whole token. There is no weight: a reader that knows only
    these channels takes it, as ``W'[:, j] = W[:, j] - W[:, -1]``.

    Args:
        channels: size of the last axis BEFORE compression; the input has one less.
        eps: added to the mean square.

    Raises:
        UsageError: fewer than two channels leave nothing.
    """

    def __init__(self, channels: int, *, eps: float = 1e-5) -> None:
        super().__init__()
        if channels < 2:
            raise UsageError(
                f"{channels} channels without one leave nothing", where="CRMSNorm", expected="two channels or more"
            )
        self.channels, self.eps = channels, eps

    def extra_repr(self) -> str:
        """Return the options, for ``print(model)``."""
        return f"{self.channels}, eps={self.eps}"

    def forward(self, z: Tensor) -> Tensor:
        """Return ``z`` (..., channels - 1) normalized."""
        wide = _wide(z)
        squares = wide.square().sum(dim=-1, keepdim=True) + wide.sum(dim=-1, keepdim=True).square()
        return _over_root(z, squares / self.channels + self.eps)


def compress_channels(x: Tensor) -> Tensor:
    """Return ``x`` (..., channels) without its mean and its last channel: (..., channels - 1)."""
    return (x - x.mean(dim=-1, keepdim=True))[..., :-1]


def expand_channels(z: Tensor) -> Tensor:
    """Return ``z`` (..., channels - 1) with the channel that makes the sum zero: (..., channels)."""
    return torch.cat((z, -z.sum(dim=-1, keepdim=True)), dim=-1)


def _over_root(x: Tensor, squared: Tensor) -> Tensor:
    """Return ``x / sqrt(squared)`` in the type of ``x``."""
    normed = x / torch.sqrt(squared)
    return normed if normed.dtype == x.dtype else normed.to(x.dtype)


def _wide(x: Tensor) -> Tensor:
    """Return ``x`` in float32 at least: squares of half precision would overflow."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return x if x.dtype == dtype else x.to(dtype)
