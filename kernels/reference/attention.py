"""A whole group of attention heads on integers: scores, softmax and the weighted sum, nothing written between.

Softmax is ``2^-t`` over the sum of a row, t the distance from the row's largest score in octaves. Its whole part is a
shift, its fraction one of 256 table entries (ours; "I-ViT", Li and Gu, 2022, arXiv 2207.01405, has a chord there, up
to 6 % too large). Weights are left at 8 bits relative to the row's largest and divided by their own sum behind the
product, so they sum to one exactly and a long flat row loses nothing.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from normfuse.kernels.reference.rescaling import codes_type, rounded_shift

__all__ = ["EXPONENTIALS", "FRACTION", "LARGEST", "RECIPROCAL", "int_attention"]

FRACTION: Final = 8
"""Bits of the exponent behind the point."""

LARGEST: Final = 31
"""Octaves beyond which a weight is zero anyway."""

RECIPROCAL: Final = 20
"""Bits by which the multiplier is widened before it is divided by a row's sum."""

EXPONENTIALS: Final = tuple(round(255 * 256 * 2 ** (-index / 256)) for index in range(256))
"""``255 * 2^-f`` at 8 bits behind the point; integers, written out in docs/integer-ops.md."""


def int_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    score_multiplier: int,
    score_shift: int,
    multiplier: int,
    shift: int,
    zero_point: int,
    minimum: int,
    maximum: int,
) -> Tensor:
    """Return the codes of ``softmax(q k + bias) v`` (ours).

    Args:
        q: int8 [..., queries, channels], zero point 0.
        k: int8 [..., channels, keys], zero point 0.
        v: int8 [..., keys, values], zero point 0.
        bias: int32 at the scale of the scores, broadcast against them; None for nothing. It is at most 2^30 in
            magnitude, scores alone are below it; -2^30 masks.
        score_multiplier: the scale of the scores times log2(e) and 2^8, times 2^score_shift.
        score_shift: see ``rescale``.
        multiplier: v's scale over the result's, times 2^(shift - 20); 0 or more.
        shift: see ``rescale``; 21 or more.
        zero_point: see ``rescale``.
        minimum: see ``rescale``.
        maximum: see ``rescale``.
    """
    scores = (q.double() @ k.double()).to(torch.int64)
    if bias is not None:
        scores = scores + bias
    below = scores.amax(-1, keepdim=True) - scores
    octaves = rounded_shift(below * score_multiplier, score_shift)
    weights = _power_of_two(octaves)
    row = (multiplier << RECIPROCAL) // weights.sum(-1, keepdim=True)
    sums = (weights.double() @ v.double()).to(torch.int64)
    found = rounded_shift(sums * row, shift) + zero_point
    return found.clamp(minimum, maximum).to(codes_type(minimum, maximum))


def _power_of_two(octaves: Tensor) -> Tensor:
    """Return ``255 * 2^-t`` rounded, 0 ... 255, for t >= 0 with ``FRACTION`` bits behind the point."""
    whole = (octaves >> FRACTION).clamp(max=LARGEST)
    fraction = octaves & ((1 << FRACTION) - 1)
    table = torch.tensor(EXPONENTIALS, device=octaves.device)
    return (table[fraction] + (128 << whole)) >> (whole + 8)
