"""``glyphs``: 62 classes of rendered characters in random fonts, bent, blurred and noisy; unlimited and seeded."""

from __future__ import annotations

import hashlib
import string
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["CLASSES", "SIZE", "render", "seed_of"]

CLASSES = string.digits + string.ascii_uppercase + string.ascii_lowercase
SIZE = 48
ATLAS = 64
MEAN, STD = 0.5, 0.25

FONTS = (
    *("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSansMono", "DejaVuSansMono-Bold"),
    *("DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-Italic", "STIXGeneral", "STIXGeneralBol"),
)


def seed_of(*parts: object) -> int:
    """Return a seed that differs for every combination of task, split and seed."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, parts)).encode()).digest()[:8], "little") >> 1


@cache
def atlas() -> Tensor:
    """Return all glyphs, float32 [fonts, classes, 64, 64] in 0..1, from the fonts that matplotlib ships."""
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


def render(count: int, seed: int, *, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """Return ``count`` normalized images, float32 [count, 1, 48, 48], and their labels, int64 [count]."""
    generator = torch.Generator(device).manual_seed(seed)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.rand(count, *shape, generator=generator, device=device) * (high - low) + low

    labels = torch.randint(len(CLASSES), (count,), generator=generator, device=device)
    fonts = torch.randint(len(FONTS), (count,), generator=generator, device=device)
    glyphs = atlas().to(device)[fonts, labels][:, None]
    grid = F.affine_grid(_affines(uniform), [count, 1, SIZE, SIZE], align_corners=False)
    ink = F.grid_sample(glyphs, grid, align_corners=False)
    ink = _blur(ink, uniform(0.3, 1.2))
    strength = uniform(0.45, 0.9, 1, 1, 1)
    strokes = _strokes(uniform) * uniform(0.0, 1.0, 1, 1, 1)
    ground = _ground(uniform)
    sign = torch.where(uniform(0, 1, 1, 1, 1) < 0.5, -1.0, 1.0)
    image = ground + sign * strength * torch.maximum(ink, 0.6 * strokes)
    noise = torch.randn(count, 1, SIZE, SIZE, generator=generator, device=device)
    image = image + noise * uniform(0.02, 0.08, 1, 1, 1)
    return ((image - MEAN) / STD).clamp(-4.0, 4.0), labels


def _affines(uniform) -> Tensor:  # type: ignore[no-untyped-def]
    """Return maps from image to atlas coordinates: rotation, shear, scale, shift."""
    angle, shear = uniform(-0.2, 0.2), uniform(-0.15, 0.15)
    scale_x, scale_y = uniform(0.85, 1.15), uniform(0.85, 1.15)
    cos, sin = torch.cos(angle), torch.sin(angle)
    rows = [
        torch.stack([cos * scale_x, (shear * cos - sin) * scale_y, uniform(-0.12, 0.12)], dim=1),
        torch.stack([sin * scale_x, (shear * sin + cos) * scale_y, uniform(-0.12, 0.12)], dim=1),
    ]
    return torch.stack(rows, dim=1)


def _blur(image: Tensor, sigma: Tensor) -> Tensor:
    """Blur each image with its own Gaussian (7 taps, separable)."""
    taps = torch.arange(-3, 4, device=image.device, dtype=image.dtype)
    kernel = torch.exp(-0.5 * (taps[None] / sigma[:, None]) ** 2)
    kernel = kernel / kernel.sum(dim=1, keepdim=True)
    flat = image.transpose(0, 1)
    flat = F.conv2d(flat, kernel[:, None, :, None], padding=(3, 0), groups=len(sigma))
    return F.conv2d(flat, kernel[:, None, None, :], padding=(0, 3), groups=len(sigma)).transpose(0, 1)


def _strokes(uniform) -> Tensor:  # type: ignore[no-untyped-def]
    """Return one thin line across each image."""
    axis = torch.linspace(-1, 1, SIZE, device=uniform(0, 1).device)
    angle, offset = uniform(0, 3.1416, 1, 1, 1), uniform(-0.8, 0.8, 1, 1, 1)
    distance = torch.cos(angle) * axis[None, None, :, None] + torch.sin(angle) * axis[None, None, None, :] - offset
    return (1.0 - distance.abs() * (SIZE / 2) / uniform(0.6, 1.6, 1, 1, 1)).clamp(0, 1)


def _ground(uniform) -> Tensor:  # type: ignore[no-untyped-def]
    """Return backgrounds: a level, a gradient and a soft texture."""
    axis = torch.linspace(-1, 1, SIZE, device=uniform(0, 1).device)
    slope = uniform(-0.2, 0.2, 1, 1, 1) * axis[None, None, :, None] + uniform(-0.2, 0.2, 1, 1, 1) * axis
    coarse = uniform(-1, 1, 1, 6, 6) * uniform(0.0, 0.18, 1, 1, 1)
    texture = F.interpolate(coarse, size=(SIZE, SIZE), mode="bilinear", align_corners=False)
    return uniform(0.3, 0.7, 1, 1, 1) + slope + texture
