"""Finds the grid that weights are on already, as those of a quantization-aware training are."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from normfuse.quant.float_type import CodeType, FloatType
from normfuse.quant.integer_type import IntegerType
from normfuse.quant.parameters import SMALLEST_SCALE

__all__ = ["existing_steps"]

MOST_BITS: Final = 8
"""The widest codes of weights that a product reads."""

NEAR: Final = 2.0**-14
"""How far the largest weight may be from a code before all are looked at: each number is rounded by 2^-24 of itself,
so a code below 2^7 is off by less than 2^-16."""


def existing_steps(rows: Tensor, type: CodeType) -> Tensor:
    """Return the step of every row whose numbers are all multiples of one, to the last bit; 0 for any other row.

    The numbers are then ``code * step`` with the codes of a symmetric grid. Of the steps that are powers of two of each
    other the smallest that the type holds: a bias is held in steps too.

    Args:
        rows: [rows, weights], float32.
        type: a signed type; nothing is looked for on a wider grid than one of 8 bits, nor among floats.

    Returns:
        float32 [rows].
    """
    found = rows.new_zeros(len(rows))
    if isinstance(type, FloatType) or type.bits > MOST_BITS:
        return found
    sizes = rows.abs()
    largest = sizes.amax(1)
    smallest = torch.where(sizes > 0, sizes, torch.inf).amin(1)
    reach = max(-type.minimum, type.maximum)
    for code in range(1, reach + 1):  # of the smallest
        ratio = largest.double() / smallest.double() * code
        fits = (found == 0) & (largest > 0) & (ratio <= reach + NEAR) & ((ratio - ratio.round()).abs() <= NEAR)
        some = fits.nonzero().flatten()
        if len(some):
            found[some] = _exact(rows[some], smallest[some] / code, type)
    return _refined(rows, found, type)


def _exact(rows: Tensor, steps: Tensor, type: IntegerType) -> Tensor:
    """Return the steps, or their neighbours among float32, whose multiples the rows are; else 0."""
    found = torch.zeros_like(steps)
    up, down = torch.full_like(steps, torch.inf), torch.zeros_like(steps)
    for tried in (steps, torch.nextafter(steps, up), torch.nextafter(steps, down)):
        codes = (rows / tried[:, None]).round()
        is_held = (codes >= type.minimum) & (codes <= type.maximum) & (codes * tried[:, None] == rows)
        found = torch.where((found == 0) & is_held.all(1) & (tried >= SMALLEST_SCALE), tried, found)
    return found


def _refined(rows: Tensor, steps: Tensor, type: IntegerType) -> Tensor:
    """Return steps halved, which is exact, as often as the type has codes for."""
    while True:
        half = steps / 2
        codes = (rows / torch.where(half > 0, half, 1.0)[:, None]).round()
        is_held = ((codes >= type.minimum) & (codes <= type.maximum)).all(1) & (half >= SMALLEST_SCALE)
        if not bool(is_held.any()):
            return steps
        steps = torch.where(is_held, half, steps)
