"""Softmax and GELU by shifts: the published forms, floor by floor, and a GELU without their faults.

"I-ViT" (Li and Gu, 2022, arXiv 2207.01405; here as in the code released with it) takes 1.4375 for log2(e), a shift for
the whole octaves of an exponential and the chord of 2^u for the rest, at most 6.2 % too large. Its results depend on
every floor, so these are here to compare with and to run models that were trained with them. For anything else
``int_attention`` and ``int_table`` are nearer to softmax and GELU, and ``lambda_shift_gelu`` where tables are not to be
had. Everything between is a 64-bit integer.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from normfuse.kernels.reference.rescaling import codes_type, rescale

__all__ = ["lambda_shift_gelu", "shift_exponential", "shift_gelu", "shiftmax"]

HIGHEST: Final = 32
"""Octaves above which an exponential stops growing; published sums are cut at 2^31 - 1 anyway."""

LARGEST: Final = 2**31 - 1
"""Where published sums are cut; reciprocals are this over a sum."""

PUBLISHED_GATE: Final = 7
"""Bits behind the point of the published sigmoid."""

GATE: Final = 16
"""The same of ours: half a unit of it times the largest 8-bit code is 2^-10 of a code."""

OCTAVES: Final = 16
"""n of our GELU: a smaller exponential would not be seen in ``GATE`` bits."""

FRACTION: Final = 6
"""Bits that our GELU puts behind the point of its codes: x0 is off by s / 128 of itself at most, not by s."""


def shift_exponential(x: Tensor, x0: int, n: int) -> Tensor:
    """Return the shift exponential ``E = e^(x s) |x0| 2^n`` of int64 x at a scale of s (published).

        p = max(x + floor(x / 2) - floor(x / 16), n x0)
        q = floor(p / x0),  r = p - q x0,  E = floor((r / 2 - x0) 2^(n - q))

    The last floor takes nothing: q is n only where r is 0. E is never 0, and |x0| for whatever is n octaves down or
    more. Above 2^32 |x0|, which no x <= 0 reaches, it stops growing (ours; unseen behind the published cut of sums).
    It is written from there downward, where every quotient is of numbers that are not negative.

    Args:
        x: above -2^60 and below 2^60.
        x0: ``floor(-1 / s)``, above -2^29.
        n: the octaves that it spans, 1 to 32.
    """
    unit = -x0
    octaves = x + (x >> 1) - (x >> 4)
    below = ((HIGHEST - n) * unit - octaves).clamp(0, HIGHEST * unit)
    whole = below // unit
    return ((2 * unit - (below - whole * unit)) << (HIGHEST - whole)) >> 1


def shiftmax(scores: Tensor, x0: int, n: int, maximum: int) -> Tensor:
    """Return a softmax over the last axis, at a scale of 1 / (maximum + 1) (published, "Shiftmax").

        E = exponential of (scores - largest of the row),  S = min(sum of E, 2^31 - 1),  f = floor((2^31 - 1) / S)
        P = floor(E f (maximum + 1) / 2^31)

    Every probability is rounded down, so a row sums to less than one: to about 0.7 for 197 keys at 8 bits. Nothing
    overflows while keys |x0| 2^n < 2^62. From 2^31 on S is cut and a row sums to more than one. A probability is cut
    at ``maximum`` (ours) only where |x0| 2^n alone is 2^31 or more.

    Args:
        scores: int8, int16 or int32 [..., keys].
        x0: ``floor(-1 / s)`` for scores at a scale of s.
        n: see ``shift_exponential``; 15 as published.
        maximum: 127 for 8-bit probabilities, 32767 for 16-bit ones.
    """
    wide = scores.to(torch.int64)
    weights = shift_exponential(wide - wide.amax(-1, keepdim=True), x0, n)
    factor = LARGEST // weights.sum(-1, keepdim=True).clamp(max=LARGEST)
    shares = (weights * factor) // ((LARGEST + 1) // (maximum + 1))
    return shares.clamp(max=maximum).to(codes_type(0, maximum))


def shift_gelu(
    x: Tensor, x0: int, n: int, multiplier: int, shift: int, zero_point: int, minimum: int, maximum: int
) -> Tensor:
    """Return the codes of ``x sigmoid(1.702 x)`` (published, "ShiftGELU"; rescaled by our rule).

        m = largest of the row,  E1 = exponential of (x - m),  E2 = exponential of -m
        S = min(E1 + E2, 2^31 - 1),  f = floor((2^31 - 1) / S),  G = floor(E1 f / 2^24),  x G at a scale of s 2^-7

    A row is the last axis, a whole token, and it has three faults. Where m is n octaves above x and 0, G is 1/2
    whatever x is: one large channel halves the others. f is a small number rounded down, so G is up to 1/16 too small
    at s = 0.03. Where all of a row is far below 0, S is cut and G at m stays |x0| / 256.

    Args:
        x: int8 or int16 [..., channels], zero point 0.
        x0: ``floor(-1 / (1.702 s))`` for x at a scale of s; nothing overflows for |x0| 2^n < 2^40.
        n: see ``shift_exponential``; 23 as published.
        multiplier: s 2^-7 over the result's scale, times 2^shift.
        shift: see ``rescale``.
        zero_point: see ``rescale``.
        minimum: see ``rescale``.
        maximum: see ``rescale``.
    """
    wide = x.to(torch.int64)
    largest = wide.amax(-1, keepdim=True)
    own, other = shift_exponential(wide - largest, x0, n), shift_exponential(-largest, x0, n)
    factor = LARGEST // (own + other).clamp(max=LARGEST)
    gate = (own * factor) >> (31 - PUBLISHED_GATE)
    return _gated(wide * gate, multiplier, shift, zero_point, minimum, maximum)


def lambda_shift_gelu(
    x: Tensor, x0: int, bound: int, multiplier: int, shift: int, zero_point: int, minimum: int, maximum: int
) -> Tensor:
    """Return the codes of ``x sigmoid(1.702 x)``, of x above lambda and of 0 below -lambda (ours).

    Our reading of the lambda-ShiftGELU of "I-Segmenter" (Sassoon et al., 2025, arXiv 2509.10334), whose formula we
    could not read: that paper may well mean something else by lambda.

        E = exponential of -|x|,  G = round(E(0) / (E(0) + E)) for x > 0,  round(E / (E(0) + E)) for x <= 0

    1. sigmoid(x) is ``e^(x - m) / (e^(x - m) + e^-m)`` for every m. Published, m is the largest of the row; here it is
       max(x, 0), the least for which neither exponent is positive. One of the two terms is then E(0), so they never
       fall to their floor together, and no channel knows of another. Lambda bounds m: what is above does not get here.
    2. G is divided for itself and rounded to the nearest 2^-16, so it is off by 2^-17 at most, to either side.
    3. x gets 6 bits behind the point first, so x0 and the floors of the exponential are as much finer.
    4. n is 16. E and E(0) + E fit in 32 bits, as published, for 1.702 s > 2^-8; the numerator of G needs 64. Nothing
       overflows there for |x0| < 2^29.

    What remains is the exponential's error, 0.01 for any x, and the sigmoid's own distance from GELU, 0.020; and a jump
    of lambda sigmoid(-1.702 lambda) at the bound, 0.018 for 3 and 0.0002 for 6.

    Args:
        x: int8 or int16 of any shape, zero point 0.
        x0: ``-round(64 / (1.702 s))`` for x at a scale of s, -1 or less.
        bound: lambda as a code of x, found for the layer; the largest magnitude of a code for none.
        multiplier: s 2^-16 over the result's scale, times 2^shift.
        shift: see ``rescale``.
        zero_point: see ``rescale``.
        minimum: see ``rescale``.
        maximum: see ``rescale``.
    """
    wide = x.to(torch.int64)
    one = -x0 << OCTAVES
    other = shift_exponential(-(wide.abs() << FRACTION), x0, OCTAVES)
    total = one + other
    gate = ((torch.where(wide > 0, one, other) << GATE) + (total >> 1)) // total
    gate = torch.where(wide > bound, 1 << GATE, torch.where(wide < -bound, 0, gate))
    return _gated(wide * gate, multiplier, shift, zero_point, minimum, maximum)


def _gated(x: Tensor, multiplier: int, shift: int, zero_point: int, minimum: int, maximum: int) -> Tensor:
    none, ratio = torch.zeros((), dtype=torch.int32), torch.tensor(multiplier)
    return rescale(x, none, ratio, shift, zero_point, minimum, maximum)
