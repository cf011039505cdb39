"""What repeated measurements show: an interval that holds their true median, however they are distributed."""

from __future__ import annotations

from collections.abc import Sequence
from math import comb

__all__ = ["median_interval"]


def median_interval(values: Sequence[float], *, confidence: float = 0.95) -> tuple[float, float]:
    """Return two of the values between which the true median lies with at least this probability.

    Each value is below the true median with probability 1/2, so how many are is binomial, and the k-th smallest and
    k-th largest enclose it but for twice that tail. Where all values are too few for this, they enclose what they
    can: the smallest and the largest are returned.
    """
    ordered = sorted(values)
    count = len(ordered)
    allowed = (1 - confidence) / 2 * 2**count
    rank, tail = 1, 1 + count  # what rank 2 would leave outside, of 2**count
    while tail <= allowed:
        rank += 1
        tail += comb(count, rank)
    return ordered[rank - 1], ordered[-rank]
