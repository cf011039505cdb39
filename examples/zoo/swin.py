"""The zoo's Swin-style network: attention inside windows that shift, and patches that merge."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["SwinShape", "SwinTransformer"]

Norm = Callable[[int], nn.Module]

FORBIDDEN = -100.0  # added to a score: exp(-100) is no attention


@dataclass(frozen=True, slots=True, kw_only=True)
class SwinShape:
    """Sizes of a `SwinTransformer`; ``width`` is the first stage's and doubles with every stage."""

    size: int
    classes: int
    width: int
    depths: tuple[int, ...]
    heads: tuple[int, ...]
    window: int


class SwinTransformer(nn.Module):
    """Stages of window attention, each on half the side of the one before, then the mean over the tokens.

    "Swin Transformer: Hierarchical Vision Transformer using Shifted Windows" (Liu et al., 2021, arXiv 2103.14030),
    with three convolutions instead of one for the patches, of 6 instead of 4, and that paper's optional table of
    absolute positions: large and small letters differ by where they end. As there, a grid no larger than the window
    is one window and does not shift.
    """

    def __init__(self, shape: SwinShape, norm: Norm) -> None:
        super().__init__()
        width, side = shape.width, shape.size // 6
        self.patch = nn.Sequential(
            *(nn.Conv2d(1, 32, 3, 2, 1), nn.ReLU(), nn.Conv2d(32, 64, 5, 3, 1), nn.ReLU(), nn.Conv2d(64, width, 1))
        )
        self.patch_norm = norm(width)
        self.position = nn.Parameter(0.02 * torch.randn(1, side**2, width))
        stages: list[nn.Module] = []
        for index, (depth, heads) in enumerate(zip(shape.depths, shape.heads, strict=True)):
            if index:
                stages.append(PatchMerging(width, side, norm))
                width, side = 2 * width, side // 2
            window = min(shape.window, side)
            shift = window // 2 if window < side else 0
            stages += [SwinBlock(width, heads, Windows(side, window, shift * (n % 2)), norm) for n in range(depth)]
        self.stages = nn.Sequential(*stages)
        self.norm = norm(width)
        self.head = nn.Linear(width, shape.classes)

    def forward(self, image: Tensor) -> Tensor:
        """Return logits (batch, classes) for images (batch, 1, size, size)."""
        x = self.patch_norm(self.patch(image).flatten(2).transpose(1, 2))
        logits: Tensor = self.head(self.norm(self.stages(x + self.position)).mean(dim=1))
        return logits


class PatchMerging(nn.Module):
    """Puts the channels of 2 x 2 neighbours side by side, normalizes them and halves their number."""

    def __init__(self, width: int, side: int, norm: Norm) -> None:
        super().__init__()
        self.side = side
        self.norm = norm(4 * width)
        self.reduction = nn.Linear(4 * width, 2 * width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return (batch, token / 4, 2 * width)."""
        batch, tokens, width = x.shape
        grid = x.reshape(batch, self.side, self.side, width)
        corners = [grid[:, down::2, right::2] for right in (0, 1) for down in (0, 1)]
        merged: Tensor = self.reduction(self.norm(torch.cat(corners, dim=-1).reshape(batch, tokens // 4, 4 * width)))
        return merged


@dataclass(frozen=True, slots=True)
class Windows:
    """How a ``side`` x ``side`` grid of tokens is cut into squares, after a cyclic shift up and to the left."""

    side: int
    window: int
    shift: int

    def cut(self, x: Tensor) -> Tensor:
        """Return (batch, window, token of the window, channel) for (batch, token, channel)."""
        batch, _, channels = x.shape
        grid = x.reshape(batch, self.side, self.side, channels)
        if self.shift:
            grid = torch.roll(grid, (-self.shift, -self.shift), dims=(1, 2))
        count = self.side // self.window
        squares = grid.reshape(batch, count, self.window, count, self.window, channels).transpose(2, 3)
        return squares.reshape(batch, count**2, self.window**2, channels)

    def join(self, x: Tensor) -> Tensor:
        """Undo `cut`."""
        batch, _, _, channels = x.shape
        count = self.side // self.window
        squares = x.reshape(batch, count, count, self.window, self.window, channels).transpose(2, 3)
        grid = squares.reshape(batch, self.side, self.side, channels)
        if self.shift:
            grid = torch.roll(grid, (self.shift, self.shift), dims=(1, 2))
        return grid.reshape(batch, self.side**2, channels)

    def mask(self) -> Tensor:
        """Return what to add to the scores, [window, 1, token, token]: neighbours only by the shift do not attend."""
        came_around = (torch.arange(self.side) < self.shift).int()
        region = 2 * came_around[:, None] + came_around[None, :]
        regions = self.cut(region.reshape(1, -1, 1))[0]
        return torch.where(regions == regions.mT, 0.0, FORBIDDEN)[:, None]

    def offsets(self) -> Tensor:
        """Return which entry of a flat (2 window - 1)^2 table each pair of tokens of a window reads."""
        line = torch.arange(self.window)
        down, right = line.repeat_interleave(self.window), line.repeat(self.window)
        apart = [position[:, None] - position[None, :] + self.window - 1 for position in (down, right)]
        return apart[0] * (2 * self.window - 1) + apart[1]


class WindowAttention(nn.Module):
    """Multi-head self-attention inside each window, with a learned bias for each relative position."""

    offsets: Tensor
    mask: Tensor

    def __init__(self, width: int, heads: int, windows: Windows) -> None:
        super().__init__()
        self.heads, self.is_shifted = heads, windows.shift > 0
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.table = nn.Parameter(0.02 * torch.randn(heads, 2 * windows.window - 1, 2 * windows.window - 1))
        self.register_buffer("offsets", windows.offsets())
        if self.is_shifted:
            self.register_buffer("mask", windows.mask())

    def forward(self, x: Tensor) -> Tensor:
        """Return (batch, window, token, width)."""
        batch, count, tokens, width = x.shape
        parts = self.qkv(x).reshape(batch, count, tokens, 3, self.heads, width // self.heads)
        q, k, v = parts.permute(3, 0, 1, 4, 2, 5)
        bias = self.table.flatten(1)[:, self.offsets]
        if self.is_shifted:
            bias = bias + self.mask
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        projected: Tensor = self.proj(mixed.transpose(2, 3).reshape(batch, count, tokens, width))
        return projected


class SwinBlock(nn.Module):
    """A pre-norm transformer block whose attention stays inside windows."""

    def __init__(self, width: int, heads: int, windows: Windows, norm: Norm) -> None:
        super().__init__()
        self.windows = windows
        self.norm1, self.attn = norm(width), WindowAttention(width, heads, windows)
        self.norm2, self.fc1, self.fc2 = norm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return (batch, token, width)."""
        x = x + self.windows.join(self.attn(self.windows.cut(self.norm1(x))))
        added: Tensor = self.fc2(F.gelu(self.fc1(self.norm2(x))))
        return x + added
