"""Batch-channel normalization: a batch norm, whose statistics fold, and a group norm after it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from normfuse.errors import UsageError

__all__ = ["BatchChannelNorm", "EstBN"]


class BatchChannelNorm(nn.Module):
    """``weight * GN(BN(x)) + bias`` with one weight and one bias per GROUP, over (batch, channels, height, width).

    "Rethinking Normalization and Elimination Singularity in Neural Networks" (Qiao et al., 2019, arXiv
    1911.09738), as in the authors' implementation. GN takes mean and variance of each sample and group, so it stays
    at inference; BN is a constant affine then and folds into the convolution before it. BN's own weight differs
    inside a group and does not pass through GN.

    With ``is_estimated`` the batch norm is `EstBN`, for batches too small for statistics of their own. The names
    are those of the authors' `BCNorm`; checkpoints of their ImageNet models, which say ``pbn`` for ``bn``, load too.

    Args:
        channels: size of axis 1.
        groups: groups of neighbouring channels.
        eps: added to the variances.
        is_estimated: normalize by running estimates in training too.

    Raises:
        UsageError: the groups do not divide the channels.
    """

    def __init__(self, channels: int, *, groups: int = 32, eps: float = 1e-5, is_estimated: bool = False) -> None:
        super().__init__()
        if groups < 1 or channels % groups:
            raise UsageError(
                f"{groups} groups do not divide {channels} channels",
                where="BatchChannelNorm",
                hint="a number of groups that divides the channels; the authors take 32",
            )
        self.channels, self.groups, self.eps = channels, groups, eps
        self.weight = nn.Parameter(torch.ones(1, groups, 1))
        self.bias = nn.Parameter(torch.zeros(1, groups, 1))
        self.bn = EstBN(channels, eps=eps) if is_estimated else nn.BatchNorm2d(channels, eps=eps)
        self.register_load_state_dict_pre_hook(_rename_batch_norm)  # type: ignore[no-untyped-call]

    def extra_repr(self) -> str:
        """Return the options, for ``print(model)``."""
        return f"{self.channels}, groups={self.groups}, eps={self.eps}"

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` (batch, channels, height, width) normalized."""
        normed: Tensor = self.bn(x)
        return F.group_norm(normed, self.groups, self._each(self.weight), self._each(self.bias), self.eps)

    def _each(self, grouped: Tensor) -> Tensor:
        """Return the value of each channel's group."""
        return grouped.reshape(self.groups, 1).expand(-1, self.channels // self.groups).reshape(-1)


class EstBN(nn.Module):
    """A batch norm that normalizes by its running estimates in training too, per channel of axis 1.

    For batches of one or two images (as for `BatchChannelNorm`). Each training forward, with m and v the running
    estimates and s the moving speed::

        m_new = m + s * (mean of x        - m)
        v_new = v + s * (mean of (x - m)² - v)     with the m of before
        y     = weight * (x - m_new) / sqrt(v_new + eps) + bias

    No gradient passes through m and v: the norm is an affine of ``x`` in training as in eval mode.

    ``estbn_moving_speed`` is a buffer that the trainer sets, usually on a falling schedule; it starts at 0, where
    nothing moves. ``num_batches_tracked`` only keeps the name in the checkpoint.

    Args:
        channels: size of axis 1.
        eps: added to the variance.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    estbn_moving_speed: Tensor

    def __init__(self, channels: int, *, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.register_buffer("num_batches_tracked", torch.tensor(0))
        self.register_buffer("estbn_moving_speed", torch.zeros(1))

    def extra_repr(self) -> str:
        """Return the options, for ``print(model)``."""
        return f"{len(self.weight)}, eps={self.eps}"

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` (batch, channels, ...) normalized."""
        if self.training:
            self._move(x.detach())
        # A clone, since the next training forward would otherwise change what this one's backward reads.
        mean, variance = (t.clone() if self.training else t for t in (self.running_mean, self.running_var))
        return F.batch_norm(x, mean, variance, self.weight, self.bias, training=False, eps=self.eps)

    def _move(self, x: Tensor) -> None:
        rows = x.transpose(0, 1).flatten(1).to(self.running_mean.dtype)  # [channels, positions]
        deviation = rows - self.running_mean[:, None]
        mean, variance = rows.mean(dim=1), deviation.square().mean(dim=1)
        self.running_mean.lerp_(mean, self.estbn_moving_speed)
        self.running_var.lerp_(variance, self.estbn_moving_speed)


def _rename_batch_norm(module: nn.Module, state: dict[str, Any], prefix: str, *rest: object) -> None:
    for key in [key for key in state if key.startswith(f"{prefix}pbn.")]:
        state[f"{prefix}bn.{key.removeprefix(f'{prefix}pbn.')}"] = state.pop(key)
