"""PowerNorm: each token scaled by the RMS of its groups, then a running second moment that folds at inference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from normfuse.errors import UsageError

__all__ = ["PowerNorm"]


class PowerNorm(nn.Module):
    """Normalize (..., channels) by the RMS of each token's groups, then by a running second moment per channel.

    "PowerNorm: Rethinking Batch Normalization in Transformers" (Shen et al., 2020, arXiv 2003.07845), with the
    constants and the order of updates of the authors' implementation. In training iteration t, with v the mean of
    u * u of each channel over all positions::

        u   = x / sqrt(mean of x * x over the token's group + eps)
        phi = v while t <= warmup, else running_phi from before this iteration
        y   = weight * u / sqrt(phi + eps) + bias
        running_phi = running_phi * (t - 1) / t + v / t      only while t < warmup
        running_phi = keep * running_phi + (1 - keep) * v    always, so warm-up updates twice

    The backward pass does not differentiate phi. With g = weight * dL/dy and z = u / sqrt(phi + eps)::

        g     <- g - (1 - backward_keep) * ema_gz * z
        ema_gz = ema_gz + mean of g * z over all positions
        dL/du  = g / sqrt(v + eps)                           the batch's v, also where phi was the running one

    The scaling by groups is differentiated exactly. In eval mode ``y = a * u + bias`` with the constant
    ``a = weight / sqrt(running_phi + eps)``: the affine folds into what reads it, the scaling stays. The checkpoint
    does not know the number of groups.

    Nothing is synchronized between processes, and training reads a counter on the host: trace in eval mode.

    Args:
        channels: size of the last axis.
        groups: groups of neighbouring channels that a token is scaled by, the number of attention heads in the
            authors' models; None leaves the scaling out, and then eval mode is an affine alone.
        warmup: iterations normalized by their own second moment.
        eps: added under both roots.
        keep: the factor that ``running_phi`` keeps per iteration (one minus PyTorch's ``momentum``).
        backward_keep: one minus the share of ``ema_gz`` that is taken from the gradient.

    Raises:
        UsageError: the groups do not divide the channels.
    """

    running_phi: Tensor
    ema_gz: Tensor
    iters: Tensor

    def __init__(
        self,
        channels: int,
        *,
        groups: int | None = 1,
        warmup: int = 10_000,
        eps: float = 1e-5,
        keep: float = 0.9,
        backward_keep: float = 0.9,
    ) -> None:
        super().__init__()
        if groups is not None and (groups < 1 or channels % groups):
            raise UsageError(
                f"{groups} groups do not divide {channels} channels",
                where="PowerNorm",
                hint="groups=1, or the number of attention heads",
            )
        self.groups, self.warmup, self.eps = groups, warmup, eps
        self.keep, self.backward_keep = keep, backward_keep
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_phi", torch.ones(1, channels, 1, 1))
        self.register_buffer("ema_gz", torch.zeros(1, channels, 1, 1))
        self.register_buffer("iters", torch.zeros(1, dtype=torch.int64))

    def extra_repr(self) -> str:
        """Return the options, for ``print(model)``."""
        return f"{len(self.weight)}, groups={self.groups}, warmup={self.warmup}, eps={self.eps}, keep={self.keep}"

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return ``x`` (..., channels) normalized.

        Args:
            x: the input.
            mask: True at padded positions, of the shape of ``x`` without its last axis. Padded positions are
                normalized but left out of the second moment; eval mode ignores the mask.
        """
        scaled = self._scale_groups(x)
        if not self.training:
            return scaled * (self.weight / torch.sqrt(self.running_phi.flatten() + self.eps)) + self.bias
        with torch.no_grad():
            rows = scaled.reshape(-1, scaled.shape[-1]) if mask is None else scaled[~mask]
            moments = self._advance(rows.square().mean(dim=0))
        normed: Tensor = _RunningNorm.apply(scaled, self.weight, self.bias, self, moments)  # type: ignore[no-untyped-call]
        return normed

    def _scale_groups(self, x: Tensor) -> Tensor:
        """Return each token over the RMS of its groups, in the buffers' type: half precision would overflow."""
        dtype = self.running_phi.dtype
        wide = x if x.dtype == dtype else x.to(dtype)
        if self.groups is None:
            return wide
        grouped = wide.reshape(*x.shape[:-1], self.groups, x.shape[-1] // self.groups)
        return (grouped / torch.sqrt(grouped.square().mean(dim=-1, keepdim=True) + self.eps)).flatten(-2)

    def _advance(self, moment: Tensor) -> _Moments:
        """Take this iteration's second moment into the running one and decide what to divide by."""
        self.iters += 1
        number = int(self.iters)
        running = self.running_phi.view(-1)
        phi = moment if number <= self.warmup else running.clone()
        if number < self.warmup:
            running.mul_((number - 1) / number).add_(moment, alpha=1.0 / number)
        running.mul_(self.keep).add_(moment, alpha=1.0 - self.keep)
        return _Moments(forward=phi, backward=moment)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Moments:
    """The second moments per channel that one training iteration divides by."""

    forward: Tensor
    backward: Tensor


class _RunningNorm(torch.autograd.Function):
    """``y = weight * u / sqrt(phi + eps) + bias`` with the authors' gradient."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, weight: Tensor, bias: Tensor, norm: PowerNorm, moments: _Moments) -> Tensor:
        z = u / torch.sqrt(moments.forward + norm.eps)
        ctx.save_for_backward(z, weight, moments.backward)
        ctx.norm = norm
        return z * weight + bias

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        z, weight, moment = ctx.saved_tensors
        norm: PowerNorm = ctx.norm
        ema_gz = norm.ema_gz.view(-1)
        positions = tuple(range(grad.ndim - 1))
        corrected = grad * weight - (1.0 - norm.backward_keep) * ema_gz * z
        ema_gz.add_((corrected * z).mean(dim=positions))
        grad_u = corrected / torch.sqrt(moment + norm.eps)
        return grad_u, (grad * z).sum(dim=positions), grad.sum(dim=positions), None, None
