"""The zoo's models: a small ViT with a choice of norms, and a residual CNN."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normfuse.nn import PRepBN, UnifiedNorm

__all__ = ["MODELS", "BatchNormTokens", "ModelEntry", "ResidualNetwork", "VisionTransformer"]

Norm = Callable[[int], nn.Module]


class BatchNormTokens(nn.Module):
    """Batch norm over (batch, token) per channel of (batch, token, channel)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(channels)

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalized tensor."""
        return self.bn(x.transpose(1, 2)).transpose(1, 2)


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
        return self.proj(mixed.transpose(1, 2).reshape(batch, tokens, width))


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, width: int, heads: int, norm: Norm) -> None:
        super().__init__()
        self.norm1, self.attn = norm(width), Attention(width, heads)
        self.norm2, self.fc1, self.fc2 = norm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return (batch, token, width)."""
        x = x + self.attn(self.norm1(x))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


def patches(patch: int, width: int) -> nn.Module:
    """Return the map from images to patches: one convolution, or for patches of 12 a small stem that learns faster."""
    if patch != 12:
        return nn.Conv2d(1, width, patch, patch)
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, 2, 1), nn.ReLU(), nn.Conv2d(32, 64, 3, 2, 1), nn.ReLU(), nn.Conv2d(64, width, 3, 3)
    )


class VisionTransformer(nn.Module):
    """A pre-norm ViT that reads the class token."""

    def __init__(self, *, size: int, patch: int, classes: int, width: int, depth: int, heads: int, norm: Norm) -> None:
        super().__init__()
        self.patch = patches(patch, width)
        self.cls = nn.Parameter(torch.zeros(1, 1, width))
        self.position = nn.Parameter(0.02 * torch.randn(1, (size // patch) ** 2 + 1, width))
        self.blocks = nn.ModuleList(Block(width, heads, norm) for _ in range(depth))
        self.norm = norm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, image: Tensor) -> Tensor:
        """Return logits (batch, classes) for images (batch, 1, size, size)."""
        x = self.patch(image).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(x.shape[0], -1, -1), x], dim=1) + self.position
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])


class ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions with batch norm and a shortcut."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels_in != channels:
            convolution = nn.Conv2d(channels_in, channels, 1, stride, bias=False)
            self.shortcut = nn.Sequential(convolution, nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Return (batch, channels, height / stride, width / stride)."""
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class ResidualNetwork(nn.Module):
    """A small ResNet for 48 x 48 images."""

    def __init__(self, *, classes: int, widths: tuple[int, ...] = (32, 64, 128), depth: int = 2) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, widths[0], 3, 2, 1, bias=False)
        self.bn = nn.BatchNorm2d(widths[0])
        stages: list[nn.Module] = []
        before = widths[0]
        for index, channels in enumerate(widths):
            for repeat in range(depth):
                stages.append(ResidualBlock(before, channels, 2 if index and not repeat else 1))
                before = channels
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(before, classes)

    def forward(self, image: Tensor) -> Tensor:
        """Return logits (batch, classes) for images (batch, 1, 48, 48)."""
        x = F.relu(self.bn(self.conv(image)))
        return self.head(self.stages(x).mean(dim=(2, 3)))


@dataclass(frozen=True, slots=True)
class ModelEntry:
    """How to build one zoo model and what to train it on; ``steps`` is the length of its training."""

    task: str
    build: Callable[[int], nn.Module]
    steps: int
    batch: int = 64
    peak_rate: float = 1.5e-3


def _glyph_vit(norm: Norm) -> nn.Module:
    return VisionTransformer(size=48, patch=12, classes=62, width=128, depth=5, heads=4, norm=norm)


def _un(steps: int) -> Norm:
    # Smoothing begins after a tenth of the run, as 4,000 of the authors' 40,000 and more iterations.
    return lambda channels: UnifiedNorm(channels, warmup=max(steps // 10, 1))


def _prepbn(steps: int) -> Norm:
    # The progression ends well before training does, so that eval mode is what was trained.
    return lambda channels: PRepBN(channels, total_step=int(0.6 * steps))


GLYPH_STEPS = 2600

MODELS: dict[str, ModelEntry] = {
    "glyphs_vit_ln": ModelEntry("glyphs", lambda steps: _glyph_vit(nn.LayerNorm), GLYPH_STEPS),
    "glyphs_vit_bn": ModelEntry("glyphs", lambda steps: _glyph_vit(BatchNormTokens), GLYPH_STEPS),
    "glyphs_vit_un": ModelEntry("glyphs", lambda steps: _glyph_vit(_un(steps)), GLYPH_STEPS),
    "glyphs_vit_prepbn": ModelEntry("glyphs", lambda steps: _glyph_vit(_prepbn(steps)), GLYPH_STEPS),
    "glyphs_resnet_bn": ModelEntry("glyphs", lambda steps: ResidualNetwork(classes=62), 1500),
    "digits_vit_ln": ModelEntry(
        "digits",
        lambda steps: VisionTransformer(size=8, patch=2, classes=10, width=96, depth=4, heads=3, norm=nn.LayerNorm),
        2000,
    ),
}
"""Every committed model by name; the file is ``examples/zoo/weights/NAME.pt2``."""
