"""Ratios of scales as an integer over a power of two, and the proof that what is computed with them fits 64 bits."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from normfuse.errors import UnsupportedModel

__all__ = ["ACCUMULATOR", "LARGEST_SHIFT", "WIDE", "Unwritable", "dyadic", "dyadic_at", "require_below"]

MULTIPLIER_BITS: Final = 31

LARGEST_SHIFT: Final = 60

ACCUMULATOR: Final = 1 << 31
"""Sums of products have to stay below this in magnitude."""

WIDE: Final = 1 << 62
"""What is shifted has to stay below this in magnitude."""


class Unwritable(ValueError):
    """A number has no place in the bits of the constant that should hold it; who knows the layer says which it is."""


def dyadic(ratios: Tensor, *, bits: int = MULTIPLIER_BITS, largest_shift: int = LARGEST_SHIFT) -> tuple[Tensor, int]:
    """Return int64 multipliers and one shift, so that ``multiplier / 2^shift`` is the nearest to every ratio.

    The largest multiplier has ``bits`` bits, unless the shift ends at ``largest_shift``: then the ratios are so small
    that little or nothing is left of what they scale.

    Args:
        ratios: float64, of any shape and sign, finite.
        bits: 2 to 46.
        largest_shift: 1 to 60.

    Raises:
        Unwritable: a ratio is not finite, or so large that no shift is left.
    """
    largest = float(ratios.abs().max()) if ratios.numel() else 0.0
    if not bool(torch.isfinite(ratios).all()) or largest >= 2.0 ** (bits - 1):
        raise Unwritable(f"ratios up to {largest} cannot be written with {bits} bits")
    _, exponent = torch.frexp(torch.tensor(largest, dtype=torch.float64))
    shift = min(bits - int(exponent), largest_shift) if largest else 1
    multipliers = torch.round(ratios.double() * 2.0**shift).to(torch.int64)
    if int(multipliers.abs().max() if multipliers.numel() else 0) >= 1 << bits:  # rounded up to the next power of two
        if shift == 1:
            raise Unwritable(f"ratios up to {largest} cannot be written with {bits} bits")
        return dyadic_at(ratios, shift - 1), shift - 1
    return multipliers, shift


def dyadic_at(ratios: Tensor, shift: int) -> Tensor:
    """Return the int64 multipliers of ratios at a given shift."""
    return torch.round(ratios.double() * 2.0**shift).to(torch.int64)


def require_below(largest: float, limit: int, *, what: str, where: str) -> None:
    """Refuse what could overflow.

    Args:
        largest: the largest magnitude that can occur.
        limit: what it has to stay below, ``ACCUMULATOR`` or ``WIDE``.
        what: how the message calls it.
        where: the layer.

    Raises:
        UnsupportedModel: it could be as large as the limit.
    """
    if largest >= limit:
        raise UnsupportedModel(
            f"{what} could reach {largest:.3g}",
            where=where,
            expected=f"less than 2^{limit.bit_length() - 1}",
            hint="a layer with fewer inputs, or --allow-float-islands, which leaves this in float",
        )
