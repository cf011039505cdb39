"""The zoo's segmenter: a ViT whose patch tokens meet one token per class, upsampled to pixels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.zoo.blocks import Block, Norm

__all__ = ["Segmenter", "SegmenterShape"]

PATCH = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmenterShape:
    """Sizes of a `Segmenter`; ``depth`` counts the blocks before the class tokens join, in one more."""

    size: int
    classes: int
    width: int
    depth: int
    heads: int


class Segmenter(nn.Module):
    """Patches seen by all others, then by a token for each class; a mask is the product of the two.

    "Segmenter: Transformer for Semantic Segmentation" (Strudel et al., 2021, arXiv 2105.05633) with its mask
    transformer, small: patches of 4 from four convolutions that see 23 pixels, a position that is the sum of a row's
    and a column's, and scaled products in place of normalized ones.
    """

    def __init__(self, shape: SegmenterShape, norm: Norm) -> None:
        super().__init__()
        width, side = shape.width, shape.size // PATCH
        self.size = shape.size
        channels = (1, 16, 32, 32, width)
        pairs = zip(channels[:-1], channels[1:], (2, 2, 1, 1), strict=True)
        convolutions = [[nn.Conv2d(before, after, 3, stride, 1), nn.ReLU()] for before, after, stride in pairs]
        self.patch = nn.Sequential(*[part for pair in convolutions for part in pair][:-1])
        self.row = nn.Parameter(0.02 * torch.randn(1, width, side, 1))
        self.column = nn.Parameter(0.02 * torch.randn(1, width, 1, side))
        self.blocks = nn.ModuleList(Block(width, shape.heads, norm) for _ in range(shape.depth))
        self.classes = nn.Parameter(0.02 * torch.randn(1, shape.classes, width))
        self.decoder = Block(width, shape.heads, norm)
        self.norm = norm(width)
        self.patch_proj, self.class_proj = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, image: Tensor) -> Tensor:
        """Return logits (batch, classes, size, size) for images (batch, 1, size, size)."""
        grid = self.patch(image) + self.row + self.column
        batch, width, side, _ = grid.shape
        x = grid.flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        x = self.norm(self.decoder(torch.cat([x, self.classes.expand(batch, -1, -1)], dim=1)))
        patches, classes = self.patch_proj(x[:, : side * side]), self.class_proj(x[:, side * side :])
        masks = classes @ patches.transpose(1, 2) * width**-0.5
        maps = masks.reshape(batch, -1, side, side)
        return F.interpolate(maps, size=(self.size, self.size), mode="bilinear", align_corners=False)
