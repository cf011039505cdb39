"""``glyphs``: 62 classes of rendered characters in random fonts, bent, blurred and noisy; unlimited and seeded."""

from __future__ import annotations

import hashlib
import string
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["CLASSES", "FONTS", "SIZE", "Dice", "atlas", "blur", "ground", "render", "seed_of", "strokes"]

CLASSES = string.digits + string.ascii_uppercase + string.ascii_lowercase
SIZE = 48
ATLAS = 64
MEAN, STD = 0.5, 0.25
LIMIT = 4.0

FONTS = (
    *("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSansMono", "DejaVuSansMono-Bold"),
    *("DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-Italic", "STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic"),
    *("cmr10", "cmss10", "cmtt10", "cmb10"),
)
"""Faces that hold all 62 characters, out of those that matplotlib ships."""


def seed_of(*parts: object) -> int:
    """Return a seed that differs for every combination of parts, such as task, split, seed and chunk."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, parts)).encode()).digest()[:8], "little") >> 1


def render(count: int, seed: int, *, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """Draw images of random characters.

    Each image has its own character, font, affine map, blur, contrast (dark on light or light on dark), ground
    (level, gradient, texture), one thin stroke across, and noise. The same seed, count and kind of device give
    the same images.

    Returns:
        Images, float32 [count, 1, 48, 48], normalized and in [-4, 4], and labels, int64 [count].
    """
    dice = Dice(count, torch.Generator(device).manual_seed(seed), SIZE)
    labels, fonts = dice.choose(len(CLASSES)), dice.choose(len(FONTS))
    glyphs = atlas().to(device)[fonts, labels][:, None]
    grid = F.affine_grid(_affines(dice), [count, 1, SIZE, SIZE], align_corners=False)
    ink = blur(F.grid_sample(glyphs, grid, align_corners=False), dice.uniform(0.3, 1.6))
    lines = strokes(dice) * dice.uniform(0.0, 0.6, 1, 1, 1)
    contrast = dice.uniform(0.35, 0.9, 1, 1, 1) * dice.sign(1, 1, 1)
    image = ground(dice) + contrast * torch.maximum(ink, lines)
    image = image + dice.normal(1, SIZE, SIZE) * dice.uniform(0.02, 0.12, 1, 1, 1)
    return ((image - MEAN) / STD).clamp(-LIMIT, LIMIT), labels


@cache
def atlas() -> Tensor:
    """Return all glyphs, float32 [fonts, classes, 64, 64] in 0..1."""
    import matplotlib
    from PIL import Image, ImageDraw, ImageFont

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    glyphs = np.zeros((len(FONTS), len(CLASSES), ATLAS, ATLAS), dtype=np.float32)
    for row, name in enumerate(FONTS):
        font = ImageFont.truetype(str(folder / f"{name}.ttf"), 44)
        for column, character in enumerate(CLASSES):
            image = Image.new("L", (ATLAS, ATLAS))
            # Baseline and origin are shared, so that case and height stay told apart.
            ImageDraw.Draw(image).text((ATLAS // 2, 46), character, fill=255, font=font, anchor="ms")
            glyphs[row, column] = np.asarray(image, dtype=np.float32) / 255.0
    return torch.from_numpy(glyphs)


@dataclass(frozen=True, slots=True)
class Dice:
    """Draws one value, or one block of values, for each of ``count`` images of ``size`` pixels to a side."""

    count: int
    generator: torch.Generator
    size: int

    def choose(self, options: int) -> Tensor:
        """Return integers below ``options``, one per image."""
        return torch.randint(options, (self.count,), generator=self.generator, device=self.generator.device)

    def uniform(self, low: float, high: float, *shape: int) -> Tensor:
        """Return numbers between ``low`` and ``high``, a block of ``shape`` per image."""
        drawn = torch.rand(self.count, *shape, generator=self.generator, device=self.generator.device)
        return drawn * (high - low) + low

    def normal(self, *shape: int) -> Tensor:
        """Return normally distributed numbers, a block of ``shape`` per image."""
        return torch.randn(self.count, *shape, generator=self.generator, device=self.generator.device)

    def sign(self, *shape: int) -> Tensor:
        """Return -1 or 1, a block of ``shape`` per image."""
        return torch.where(self.uniform(0.0, 1.0, *shape) < 0.5, -1.0, 1.0)

    def axes(self) -> tuple[Tensor, Tensor]:
        """Return the vertical and the horizontal coordinate of every pixel, -1..1."""
        line = torch.linspace(-1, 1, self.size, device=self.generator.device)
        return line[None, None, :, None], line[None, None, None, :]


def _affines(dice: Dice) -> Tensor:
    """Return maps from image to atlas coordinates: rotation, shear, scale, shift."""
    angle, shear = dice.uniform(-0.2, 0.2), dice.uniform(-0.15, 0.15)
    scale_x, scale_y = dice.uniform(0.8, 1.2), dice.uniform(0.8, 1.2)
    cos, sin = torch.cos(angle), torch.sin(angle)
    rows = [
        torch.stack([cos * scale_x, (shear * cos - sin) * scale_y, dice.uniform(-0.12, 0.12)], dim=1),
        torch.stack([sin * scale_x, (shear * sin + cos) * scale_y, dice.uniform(-0.12, 0.12)], dim=1),
    ]
    return torch.stack(rows, dim=1)


def blur(image: Tensor, sigma: Tensor) -> Tensor:
    """Blur each image with its own Gaussian (7 taps, separable)."""
    taps = torch.arange(-3, 4, device=image.device, dtype=image.dtype)
    kernel = torch.exp(-0.5 * (taps[None] / sigma[:, None]) ** 2)
    kernel = kernel / kernel.sum(dim=1, keepdim=True)
    flat = image.transpose(0, 1)  # a group of the convolution per image
    flat = F.conv2d(flat, kernel[:, None, :, None], padding=(3, 0), groups=len(sigma))
    return F.conv2d(flat, kernel[:, None, None, :], padding=(0, 3), groups=len(sigma)).transpose(0, 1)


def strokes(dice: Dice) -> Tensor:
    """Return one thin line across each image, 0..1."""
    down, right = dice.axes()
    angle, offset = dice.uniform(0, np.pi, 1, 1, 1), dice.uniform(-0.8, 0.8, 1, 1, 1)
    distance = torch.cos(angle) * down + torch.sin(angle) * right - offset
    width = dice.uniform(0.6, 1.6, 1, 1, 1)  # in pixels, to each side
    return (1.0 - distance.abs() * (dice.size / 2) / width).clamp(0, 1)


def ground(dice: Dice) -> Tensor:
    """Return backgrounds: a level, a gradient and a soft texture."""
    down, right = dice.axes()
    slope = dice.uniform(-0.2, 0.2, 1, 1, 1) * down + dice.uniform(-0.2, 0.2, 1, 1, 1) * right
    coarse = dice.uniform(-1, 1, 1, 6, 6) * dice.uniform(0.0, 0.18, 1, 1, 1)
    texture = F.interpolate(coarse, size=(dice.size, dice.size), mode="bilinear", align_corners=False)
    return dice.uniform(0.3, 0.7, 1, 1, 1) + slope + texture
