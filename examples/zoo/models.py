"""The zoo's models: a small ViT with a choice of norms, a residual CNN, one of shifted windows, one that segments."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.zoo.blocks import Block, Norm, PostNormBlock
from examples.zoo.scenes import CHARACTERS
from examples.zoo.segmenter import Segmenter, SegmenterShape
from examples.zoo.swin import SwinShape, SwinTransformer
from normfuse.nn import PRepBN, UnifiedNorm

__all__ = ["MODELS", "BatchNormTokens", "ModelEntry", "ResidualNetwork", "VisionShape", "VisionTransformer"]


class BatchNormTokens(nn.Module):
    """Batch norm over (batch, token) per channel of (batch, token, channel)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(channels)

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalized tensor."""
        normed: Tensor = self.bn(x.transpose(1, 2))
        return normed.transpose(1, 2)


@dataclass(frozen=True, slots=True, kw_only=True)
class VisionShape:
    """Sizes of a `VisionTransformer`.

    ``has_stem`` makes patches with three convolutions instead of one; ``is_post_norm`` puts the norms behind the
    sums, the last of them in place of the final norm.
    """

    size: int
    patch: int
    classes: int
    width: int
    depth: int
    heads: int
    has_stem: bool = False
    is_post_norm: bool = False


class VisionTransformer(nn.Module):
    """A ViT that reads the class token."""

    def __init__(self, shape: VisionShape, norm: Norm) -> None:
        super().__init__()
        width = shape.width
        self.patch = _stem(shape) if shape.has_stem else nn.Conv2d(1, width, shape.patch, shape.patch)
        self.cls = nn.Parameter(torch.zeros(1, 1, width))
        self.position = nn.Parameter(0.02 * torch.randn(1, (shape.size // shape.patch) ** 2 + 1, width))
        block = PostNormBlock if shape.is_post_norm else Block
        self.blocks = nn.ModuleList(block(width, shape.heads, norm) for _ in range(shape.depth))
        self.norm = nn.Identity() if shape.is_post_norm else norm(width)
        self.head = nn.Linear(width, shape.classes)

    def forward(self, image: Tensor) -> Tensor:
        """Return logits (batch, classes) for images (batch, 1, size, size)."""
        x = self.patch(image).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(x.shape[0], -1, -1), x], dim=1) + self.position
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x)[:, 0])
        return logits


def _stem(shape: VisionShape) -> nn.Module:
    """Return convolutions from images to patches: from scratch they learn in half the steps of a single one."""
    last = shape.patch // 4  # two strides of 2 come before it
    return nn.Sequential(
        *(nn.Conv2d(1, 32, 3, 2, 1), nn.ReLU(), nn.Conv2d(32, 64, 3, 2, 1), nn.ReLU()),
        nn.Conv2d(64, shape.width, last, last),
    )


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
        logits: Tensor = self.head(self.stages(x).mean(dim=(2, 3)))
        return logits


@dataclass(frozen=True, slots=True)
class ModelEntry:
    """How to build one zoo model and how to train it.

    ``steps`` is the length of the training, ``warm_up`` the share of them in which the rate rises to its peak.
    """

    task: str
    build: Callable[[int], nn.Module]
    steps: int
    batch: int = 64
    peak_rate: float = 1.5e-3
    warm_up: float = 0.06


GLYPHS_SHAPE = VisionShape(size=48, patch=12, classes=62, width=128, depth=5, heads=4, has_stem=True)
GLYPHS_POST_SHAPE = replace(GLYPHS_SHAPE, width=96, heads=3, is_post_norm=True)
GLYPHS_SWIN_SHAPE = SwinShape(size=48, classes=62, width=64, depths=(2, 2), heads=(2, 4), window=4)
SCENES_SHAPE = SegmenterShape(size=64, classes=1 + len(CHARACTERS), width=32, depth=2, heads=2)
DIGITS_SHAPE = VisionShape(size=8, patch=2, classes=10, width=96, depth=4, heads=3)
GLYPHS_STEPS = 2600


def _glyphs_vit(norm: Callable[[int], Norm], *, steps: int = GLYPHS_STEPS) -> ModelEntry:
    return ModelEntry("glyphs", lambda steps: VisionTransformer(GLYPHS_SHAPE, norm(steps)), steps)


def _un(steps: int) -> Norm:
    # Smoothing begins after a tenth of the run, as 4,000 of the authors' 40,000 and more iterations.
    return lambda channels: UnifiedNorm(channels, warmup=max(steps // 10, 1))


def _prepbn(steps: int) -> Norm:
    # The progression ends well before training does, so that eval mode is what was trained.
    return lambda channels: PRepBN(channels, total_step=int(0.6 * steps))


MODELS: dict[str, ModelEntry] = {
    # On this task layer norm stays longest near chance, then UN; batch norm is the quickest to learn.
    "glyphs_vit_ln": _glyphs_vit(lambda steps: nn.LayerNorm, steps=5200),
    "glyphs_vit_bn": _glyphs_vit(lambda steps: BatchNormTokens),
    "glyphs_vit_un": _glyphs_vit(_un, steps=4000),
    "glyphs_vit_prepbn": _glyphs_vit(_prepbn),
    # Norms on the residual stream itself: a lower rate, reached more slowly, was stable at the first attempt.
    "glyphs_vit_un_post": ModelEntry(
        "glyphs", lambda steps: VisionTransformer(GLYPHS_POST_SHAPE, _un(steps)), 4000, peak_rate=1e-3, warm_up=0.1
    ),
    "glyphs_swin_prepbn": ModelEntry("glyphs", lambda steps: SwinTransformer(GLYPHS_SWIN_SHAPE, _prepbn(steps)), 3600),
    "glyphs_resnet_bn": ModelEntry("glyphs", lambda steps: ResidualNetwork(classes=62), 1000),
    "scenes_segmenter_ln": ModelEntry(
        "glyph-scenes", lambda steps: Segmenter(SCENES_SHAPE, nn.LayerNorm), 6000, batch=16, peak_rate=2e-3
    ),
    "digits_vit_ln": ModelEntry("digits", lambda steps: VisionTransformer(DIGITS_SHAPE, nn.LayerNorm), 2000),
}
"""Every committed model by name; the file is ``examples/zoo/weights/NAME.pt2``."""
