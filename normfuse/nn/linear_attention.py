"""Simplified linear attention: relu for the softmax, so that the products associate the cheaper way."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from normfuse.errors import UsageError

__all__ = ["SimplifiedLinearAttention"]

SMALLEST_TOTAL = 1e-6


class SimplifiedLinearAttention(nn.Module):
    """Attention of (batch, token, channels) over a grid of tokens, linear in their number where that is cheaper.

    "SLAB: Efficient Transformers with Simplified Linear Attention and Progressive Re-parameterized Batch
    Normalization" (Guo et al., 2024, arXiv 2405.11582), with the constants of the authors' implementation. With
    Q, K, V of one head and P its channels of a learned table of positions::

        q, k  = relu(Q), relu(K + P)
        out_i = (q_i . sum_j k_j v_j) / (q_i . sum_j k_j + 1e-6) + depthwise(V)_i

    then heads are joined and projected. Nothing is divided by the root of the head's size. ``depthwise`` is a
    convolution of the grid with one filter per channel of a head, the same filters for all heads.

    ``(q kᵀ) v`` and ``q (kᵀ v)`` are equal but for rounding; the cheaper is taken: the second where there are more
    tokens than channels in a head. Both sides are constants of the module, so an exported graph has one order.

    The attention proper is computed in float32 at least, outside of autocast: its sums over all tokens leave the
    range of float16. The projections and the convolution stay in the type they are run in. Without autocast no
    such block is in the exported graph.

    The names are those of the authors' checkpoints (their DeiT and Swin models). Dropout and their PVT form, with
    fewer keys than queries, are not here.

    Args:
        channels: size of the last axis.
        grid: height and width of the grid that the tokens are, row after row; one number for a square.
        heads: number of heads.
        kernel_size: of the convolution; odd.
        has_bias: whether Q, K and V have a bias.

    Raises:
        UsageError: the heads do not divide the channels, or the kernel size is even.
    """

    def __init__(
        self,
        channels: int,
        grid: int | tuple[int, int],
        heads: int,
        *,
        kernel_size: int = 5,
        has_bias: bool = True,
    ) -> None:
        super().__init__()
        if heads < 1 or channels % heads:
            raise UsageError(
                f"{heads} heads do not divide {channels} channels",
                where="SimplifiedLinearAttention",
                expected="a number of heads that divides the channels",
            )
        if kernel_size % 2 == 0:
            raise UsageError(
                f"a kernel of {kernel_size} does not keep the grid",
                where="SimplifiedLinearAttention",
                expected="an odd kernel size",
            )
        self.height, self.width = (grid, grid) if isinstance(grid, int) else grid
        self.heads, self.head_size = heads, channels // heads
        self.qkv = nn.Linear(channels, 3 * channels, bias=has_bias)
        self.proj = nn.Linear(channels, channels)
        self.dwc = nn.Conv2d(
            self.head_size, self.head_size, kernel_size, padding=kernel_size // 2, groups=self.head_size
        )
        self.positional_encoding = nn.Parameter(torch.zeros(1, self.height * self.width, channels))

    def extra_repr(self) -> str:
        """Return the options, for ``print(model)``."""
        return f"grid=({self.height}, {self.width}), heads={self.heads}"

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` (batch, height * width, channels) attended."""
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        attended = self._attend(F.relu(q), F.relu(k + self.positional_encoding), v)
        y: Tensor = self.proj(_cast(attended + self._convolve(v), self.proj.weight.dtype))
        return y

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return the weighted means of ``v``, heads joined again; ``q`` and ``k`` are not negative."""
        with _outside_autocast(q):
            q, k, v = (self._split(_cast(t, torch.promote_types(t.dtype, torch.float32))) for t in (q, k, v))
            total = q @ k.sum(dim=-2, keepdim=True).mT + SMALLEST_TOTAL  # [batch, heads, tokens, 1]
            is_linear_cheaper = self.height * self.width > self.head_size
            mixed = q @ (k.mT @ v) if is_linear_cheaper else (q @ k.mT) @ v
            return (mixed / total).transpose(1, 2).flatten(2)

    def _split(self, x: Tensor) -> Tensor:
        """Return ``x`` (batch, token, channels) as (batch, heads, token, head_size)."""
        return x.reshape(-1, self.height * self.width, self.heads, self.head_size).transpose(1, 2)

    def _convolve(self, v: Tensor) -> Tensor:
        """Return the depthwise convolution of ``v`` (batch, token, channels), all heads in one."""
        image = v.mT.reshape(-1, self.heads * self.head_size, self.height, self.width)
        weight = self.dwc.weight.repeat(self.heads, 1, 1, 1)
        bias = None if self.dwc.bias is None else self.dwc.bias.repeat(self.heads)
        channels = self.heads * self.head_size
        return F.conv2d(image, weight, bias, padding=self.dwc.kernel_size[0] // 2, groups=channels).flatten(2).mT


def _outside_autocast(x: Tensor) -> AbstractContextManager[object]:
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``x`` in ``dtype``, without a node in the exported graph where it is so already."""
    return x if x.dtype == dtype else x.to(dtype)
