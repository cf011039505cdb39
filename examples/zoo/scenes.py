"""``glyph-scenes``: characters turned and overlapping, among strokes and noise, and which one each pixel shows."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from examples.zoo.glyphs import CLASSES, FONTS, LIMIT, MEAN, STD, Dice, atlas, blur, ground, strokes

__all__ = ["BACKGROUND", "CHARACTERS", "SIZE", "render"]

CHARACTERS = "248AHSTX"
"""Class 1 and on; class 0 is the background."""
BACKGROUND = 0
SIZE = 64
LEAST, MOST = 2, 4
LINES = 3
PEN = 1  # pixel of the atlas that every outline is moved outwards: patches of 4 cannot show thin strokes
TURN = math.radians(35)

HEAVY = ("DejaVuSans-Bold", "DejaVuSansMono-Bold", "DejaVuSerif-Bold", "STIXGeneralBol", "cmb10")
"""Faces whose strokes are some pixels wide here, so that there is something to segment."""


def render(count: int, seed: int, *, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """Draw scenes of two to four characters.

    Each character has its own face, size, place, turn and brightness (lighter or darker than the ground), and covers
    those drawn before it. Thin strokes lie below them and belong to the background. The same seed, count and kind of
    device give the same scenes.

    Returns:
        Images, float32 [count, 1, 64, 64], normalized and in [-4, 4], and the class of each pixel, int64
        [count, 64, 64].
    """
    dice = Dice(count, torch.Generator(device).manual_seed(seed), SIZE)
    softness, number = dice.uniform(0.3, 1.2), LEAST + dice.choose(MOST - LEAST + 1)
    shade = torch.zeros(count, 1, SIZE, SIZE, device=device)
    for _ in range(LINES):
        shade = torch.lerp(shade, _shade(dice, 0.1, 0.5), strokes(dice))
    labels = torch.full((count, SIZE, SIZE), BACKGROUND, device=device)
    for index in range(MOST):
        characters, ink = _characters(dice)
        ink = ink * (index < number)[:, None, None, None]
        shade = torch.lerp(shade, _shade(dice, 0.35, 0.8), ink)
        labels = torch.where(ink[:, 0] > 0.5, 1 + characters[:, None, None], labels)
    image = ground(dice) + blur(shade, softness)
    image = image + dice.normal(1, SIZE, SIZE) * dice.uniform(0.02, 0.12, 1, 1, 1)
    return ((image - MEAN) / STD).clamp(-LIMIT, LIMIT), labels


def _shade(dice: Dice, low: float, high: float) -> Tensor:
    """Return one brightness for each scene, added to the ground's."""
    return (dice.sign(1, 1, 1) * dice.uniform(low, high, 1, 1, 1)).expand(-1, 1, SIZE, SIZE)


def _characters(dice: Dice) -> tuple[Tensor, Tensor]:
    """Return one character for each scene and its ink, 0..1 [count, 1, 64, 64]."""
    faces = torch.tensor([FONTS.index(name) for name in HEAVY], device=dice.generator.device)
    columns = torch.tensor([CLASSES.index(character) for character in CHARACTERS], device=dice.generator.device)
    chosen = dice.choose(len(CHARACTERS))
    glyphs = atlas().to(dice.generator.device)[faces[dice.choose(len(HEAVY))], columns[chosen]][:, None]
    glyphs = F.max_pool2d(glyphs, 2 * PEN + 1, stride=1, padding=PEN)
    grid = F.affine_grid(_places(dice), [dice.count, 1, SIZE, SIZE], align_corners=False)
    return chosen, F.grid_sample(glyphs, grid, align_corners=False)


def _places(dice: Dice) -> Tensor:
    """Return maps from scene to atlas coordinates: moved to a random place, turned, made larger or smaller."""
    angle, zoom = dice.uniform(-TURN, TURN), 1 / dice.uniform(0.65, 1.1)
    turn = torch.stack([torch.cos(angle), -torch.sin(angle), torch.sin(angle), torch.cos(angle)], dim=1)
    linear = zoom[:, None, None] * turn.reshape(-1, 2, 2)
    return torch.cat([linear, -linear @ dice.uniform(-0.7, 0.7, 2, 1)], dim=2)
