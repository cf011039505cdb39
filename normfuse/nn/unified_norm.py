"""Unified Normalization: second moments smoothed over iterations, a constant affine at inference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

__all__ = ["UnifiedNorm"]

LARGEST_RATIO = 5.0
LAST_ITERATION_WITHOUT_RATIO = 1000


class UnifiedNorm(nn.Module):
    """Normalize (..., channels) by a smoothed second moment per channel; no mean is subtracted.

    "Unified Normalization for Accelerating and Stabilizing Transformers" (Yang et al., 2022, arXiv 2208.01313),
    with the constants and the order of updates of the authors' implementation. In training iteration t, with
    v the second moment of each channel over all positions::

        phi = v while t <= window or t < warmup, else the geometric mean of the last ``window`` v
        y   = weight * x / sqrt(phi + eps) + bias
        running_var = keep * running_var + (1 - keep) * phi

    In eval mode ``y = weight * x / sqrt(running_var + eps) + bias``: an affine that folds. ``running_var`` is a
    running *second moment*; its name is that of the authors' checkpoints, whose keys all load here.

    The backward pass smooths too: where the exact gradient has the mean of ``g * z``, it takes a running mean of
    the last iterations' values. After iteration max(1000, warmup) it also scales the gradients of ``x`` and
    ``weight`` by ``r = sqrt(phi + eps) / sqrt(running_var + eps)``, a constant clipped to [1/5, 5], so that
    parameters move as if they had seen the inference form.

    ``outlier_filtration`` is what the authors' code does, not the published inequality (which can never hold):
    the window's gap between arithmetic and geometric mean is compared, channel by channel, with ``window`` times
    ONE scalar, the unbiased variance over all window entries and channels of the buffer BEFORE its update. The
    scalar measures the spread between channels more than that over time. Inference does not depend on it.

    Nothing is synchronized between processes, and training reads a counter on the host: trace in eval mode.

    Args:
        channels: size of the last axis.
        window: iterations to smooth over; a pair for forward and backward; 1 turns the smoothing off.
        warmup: iterations before smoothing (and filtration) begin.
        eps: added under the root.
        keep: the factor that running statistics keep per iteration (one minus PyTorch's ``momentum``).
        outlier_filtration: leave iterations out of the smoothing whose statistics jump.
    """

    running_var: Tensor
    ema_gz: Tensor
    iters: Tensor
    buffer_x2: Tensor
    buffer_gz: Tensor
    skip_counter: Tensor

    def __init__(
        self,
        channels: int,
        *,
        window: int | tuple[int, int] = 4,
        warmup: int = 4000,
        eps: float = 1e-5,
        keep: float = 0.9,
        outlier_filtration: bool = False,
    ) -> None:
        super().__init__()
        self.window, self.backward_window = (window, window) if isinstance(window, int) else window
        self.warmup, self.eps, self.keep = warmup, eps, keep
        self.outlier_filtration = outlier_filtration
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.register_buffer("ema_gz", torch.zeros(channels))
        self.register_buffer("iters", torch.zeros(1, dtype=torch.int64))
        self.register_buffer("buffer_x2", torch.zeros(self.window, channels))
        self.register_buffer("buffer_gz", torch.zeros(self.backward_window, channels))
        self.register_buffer("skip_counter", torch.zeros(1, dtype=torch.int64))

    def extra_repr(self) -> str:
        """Return the options, for ``print(model)``."""
        windows = f"window=({self.window}, {self.backward_window}), warmup={self.warmup}"
        return f"{len(self.weight)}, {windows}, eps={self.eps}, keep={self.keep}"

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return ``x`` (..., channels) normalized.

        Args:
            x: the input.
            mask: True at padded positions, of the shape of ``x`` without its last axis. Padded positions are
                normalized but left out of the statistics; eval mode ignores the mask.
        """
        if not self.training:
            return x * (self.weight / torch.sqrt(self.running_var + self.eps)) + self.bias
        with torch.no_grad():
            iteration = self._advance(_second_moment(x, mask, self.running_var.dtype))
        normed: Tensor = _SmoothedNorm.apply(x, self.weight, self.bias, self, iteration)  # type: ignore[no-untyped-call]
        return normed

    def _advance(self, moment: Tensor) -> _Iteration:
        """Take this iteration's second moment into the buffers and decide how to normalize."""
        self.iters += 1
        number = int(self.iters)
        spread = torch.sqrt(self.buffer_x2).var() if self.buffer_x2.numel() > 1 else None
        self.buffer_x2[number % self.window] = moment
        is_skipped = self.window <= 1
        if spread is not None and self._is_outlier(number, spread):
            self.buffer_x2[number % self.window] = self.running_var
            self.skip_counter += 1
            is_skipped = True
        is_early = number <= self.window or number < self.warmup
        phi = moment if is_early or is_skipped else _geometric_mean(self.buffer_x2)
        ratio = torch.ones_like(phi)
        if number > max(LAST_ITERATION_WITHOUT_RATIO, self.warmup) and not is_skipped:
            ratio = torch.sqrt(phi + self.eps) / torch.sqrt(self.running_var + self.eps)
            ratio = ratio.clamp(1.0 / LARGEST_RATIO, LARGEST_RATIO)
        self.running_var.mul_(self.keep).add_(phi, alpha=1.0 - self.keep)
        return _Iteration(number=number, phi=phi, ratio=ratio, is_skipped=is_skipped)

    def _is_outlier(self, number: int, spread: Tensor) -> bool:
        if not self.outlier_filtration or number < self.warmup:
            return False
        gap = self.buffer_x2.mean(dim=0) - _geometric_mean(self.buffer_x2)
        return bool((gap > self.window * spread).any())

    def _smooth_gradient(self, moment: Tensor, iteration: _Iteration) -> Tensor:
        """Take this iteration's mean of g * z into the buffers; return what stands for it in the gradient."""
        slot = iteration.number % self.backward_window
        self.buffer_gz[slot] = self.ema_gz if iteration.is_skipped else moment
        is_early = iteration.number <= self.backward_window or iteration.number < self.warmup
        mean = moment if is_early or iteration.is_skipped else self.buffer_gz.mean(dim=0)
        self.ema_gz.mul_(self.keep).add_(mean, alpha=1.0 - self.keep)
        return mean if iteration.is_skipped else self.ema_gz


@dataclass(frozen=True, slots=True, kw_only=True)
class _Iteration:
    """What one training forward decided; ``phi`` and ``ratio`` are per channel."""

    number: int
    phi: Tensor
    ratio: Tensor
    is_skipped: bool


class _SmoothedNorm(torch.autograd.Function):
    """``y = weight * x / sqrt(phi + eps) + bias`` with the smoothed gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, norm: UnifiedNorm, iteration: _Iteration) -> Tensor:
        inverse = 1.0 / torch.sqrt(iteration.phi + norm.eps)
        z = x * inverse
        ctx.save_for_backward(z, weight, inverse)
        ctx.norm, ctx.iteration, ctx.input_dtype = norm, iteration, x.dtype
        return z * weight + bias

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        z, weight, inverse = ctx.saved_tensors
        positions = tuple(range(grad.ndim - 1))
        projected = (grad * z).sum(dim=positions)
        scale = ctx.iteration.ratio * weight
        # mean(g * z) with g = scale * grad: the scale is constant over positions and comes out of the sum.
        moment = scale * projected / (grad.numel() // grad.shape[-1])
        smoothed = ctx.norm._smooth_gradient(moment, ctx.iteration)
        grad_x = ((grad * scale - z * smoothed) * inverse).to(ctx.input_dtype)
        return grad_x, ctx.iteration.ratio * projected, grad.sum(dim=positions), None, None


def _second_moment(x: Tensor, mask: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return the mean square per channel, summed in ``dtype``: half precision would lose small channels."""
    rows = x.reshape(-1, x.shape[-1]) if mask is None else x[~mask]
    return rows.to(dtype).square().mean(dim=0)


def _geometric_mean(moments: Tensor) -> Tensor:
    return moments.log().mean(dim=0).exp()
