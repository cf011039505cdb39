"""RepBN and its progressive form PRepBN: a batch norm with a scaled identity beside it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["PRepBN", "RepBN"]


class RepBN(nn.Module):
    """``BN(x) + alpha * x``, batch norm per channel over all positions of (batch, ..., channels).

    "SLAB: Efficient Transformers with Simplified Linear Attention and Progressive Re-parameterized Batch
    Normalization" (Guo et al., 2024, arXiv 2405.11582), equation for RepBN; ``alpha`` is one learned number (eta
    in the paper). In eval mode it is the affine ``(weight / sqrt(var + eps) + alpha) * x + c``, which folds.

    Args:
        channels: size of the last axis.
        eps: added to the variance.
    """

    def __init__(self, channels: int, *, eps: float = 1e-5) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(1))
        self.bn = nn.BatchNorm1d(channels, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` (batch, channels), (batch, token, channels) or (batch, ..., channels) normalized."""
        tokens = x.flatten(1, -2) if x.ndim > 3 else x
        turned = tokens.transpose(1, -1)  # BatchNorm1d wants the channels second
        normed: Tensor = (self.bn(turned) + self.alpha * turned).transpose(1, -1)
        return normed.reshape(x.shape) if x.ndim > 3 else normed


class PRepBN(nn.Module):
    """Goes from layer norm to RepBN while it trains; in eval mode it is RepBN, whatever the progress.

    SLAB (as for `RepBN`), progressive strategy. For ``warm`` training forwards layer norm alone; then
    ``lam * LN(x) + (1 - lam) * RepBN(x)``, ``lam`` falling linearly from ``start`` to 0 in ``total_step``
    forwards. The counters ``warm`` and ``iter`` count training *forwards* (with gradient accumulation there are
    several per optimizer step) and are kept in the checkpoint. While ``iter`` is not 0, eval mode is not what
    was trained.

    Args:
        channels: size of the last axis.
        total_step: training forwards from layer norm to RepBN.
        warm: training forwards of layer norm alone before that.
        start: first weight of the layer norm.
        eps: added to the variances.
    """

    warm: Tensor
    iter: Tensor
    total_step: Tensor

    def __init__(
        self, channels: int, *, total_step: int = 300_000, warm: int = 0, start: float = 1.0, eps: float = 1e-5
    ) -> None:
        super().__init__()
        self.start = start
        self.register_buffer("warm", torch.tensor(warm))
        self.register_buffer("iter", torch.tensor(total_step))
        self.register_buffer("total_step", torch.tensor(total_step))
        self.norm1 = nn.LayerNorm(channels, eps=eps)
        self.norm2 = RepBN(channels, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` (batch, ..., channels) normalized."""
        if not self.training:
            return self._repbn(x)
        if int(self.warm) > 0:
            self.warm -= 1
            return self._layer_norm(x)
        share = self._next_share()
        return share * self._layer_norm(x) + (1.0 - share) * self._repbn(x)

    def _next_share(self) -> float:
        """Return the layer norm's weight in this forward and count it."""
        left = int(self.iter)
        self.iter.fill_(max(left - 1, 0))
        return self.start * left / max(int(self.total_step), 1)

    def _layer_norm(self, x: Tensor) -> Tensor:
        normed: Tensor = self.norm1(x)
        return normed

    def _repbn(self, x: Tensor) -> Tensor:
        normed: Tensor = self.norm2(x)
        return normed
