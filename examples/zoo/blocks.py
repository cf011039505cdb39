"""The zoo's transformer blocks, before and behind whose sums a norm of any kind stands."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Attention", "Block", "Norm", "PostNormBlock"]

Norm = Callable[[int], nn.Module]


class Attention(nn.Module):
    """Multi-head self-attention with one joint projection to q, k and v."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return (batch, token, width)."""
        batch, tokens, width = x.shape
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v)
        projected: Tensor = self.proj(mixed.transpose(1, 2).reshape(batch, tokens, width))
        return projected


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, width: int, heads: int, norm: Norm) -> None:
        super().__init__()
        self.norm1, self.attn = norm(width), Attention(width, heads)
        self.norm2, self.fc1, self.fc2 = norm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return (batch, token, width)."""
        x = x + self.attn(self.norm1(x))
        added: Tensor = self.fc2(F.gelu(self.fc1(self.norm2(x))))
        return x + added


class PostNormBlock(Block):
    """A post-norm transformer block: each norm stands behind its sum, on the residual stream itself."""

    def forward(self, x: Tensor) -> Tensor:
        """Return (batch, token, width)."""
        x = self.norm1(x + self.attn(x))
        normed: Tensor = self.norm2(x + self.fc2(F.gelu(self.fc1(x))))
        return normed
