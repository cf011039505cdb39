"""EvoNorm-B0: normalization and activation in one, by the batch's variance or each image's own."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["EvoNormB0"]


class EvoNormB0(nn.Module):
    """``weight * x / max(sqrt(var + eps), v * x + std) + bias`` over (batch, channels, height, width).

    "Evolving Normalization-Activation Layers" (Liu et al., 2020, arXiv 2004.02967), with the names and constants of
    timm's implementation. ``var`` is the variance of each channel over the batch, ``std`` the root of ``eps`` and
    the variance of each channel of each image, both biased; no mean is subtracted. With n values per channel::

        running_var = keep * running_var + (1 - keep) * var * n / (n - 1)

    which takes the place of ``var`` in eval mode. The second argument of the maximum depends on ``x``, so the layer
    stays at inference; only ``weight`` and ``bias`` fold, into what reads it.

    Args:
        channels: size of axis 1.
        eps: added to both variances.
        keep: the factor that ``running_var`` keeps per iteration (one minus PyTorch's ``momentum``).
    """

    running_var: Tensor

    def __init__(self, channels: int, *, eps: float = 1e-3, keep: float = 0.9) -> None:
        super().__init__()
        self.eps, self.keep = eps, keep
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.v = nn.Parameter(torch.ones(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def extra_repr(self) -> str:
        """Return the options, for ``print(model)``."""
        return f"{len(self.weight)}, eps={self.eps}, keep={self.keep}"

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` (batch, channels, height, width) normalized and activated."""
        wide = x if x.dtype == self.running_var.dtype else x.to(self.running_var.dtype)
        variance = self._batch_variance(wide) if self.training else self.running_var
        std = torch.sqrt(wide.var(dim=(2, 3), correction=0, keepdim=True) + self.eps)
        divisor = torch.maximum(_planes(torch.sqrt(variance + self.eps)), _planes(self.v) * wide + std)
        return wide / divisor * _planes(self.weight) + _planes(self.bias)

    def _batch_variance(self, x: Tensor) -> Tensor:
        variance = x.var(dim=(0, 2, 3), correction=0)
        count = x.numel() // x.shape[1]
        unbiased = variance.detach() * (count / max(count - 1, 1))
        self.running_var.mul_(self.keep).add_(unbiased, alpha=1.0 - self.keep)
        return variance


def _planes(per_channel: Tensor) -> Tensor:
    return per_channel.reshape(1, -1, 1, 1)
