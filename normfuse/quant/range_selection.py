"""From a histogram to the ranges worth trying: min-max, percentiles, least squared error, least divergence."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from fractions import Fraction
from typing import Final, assert_never

import numpy as np

from normfuse.errors import UsageError
from normfuse.quant.float_type import CodeType, FloatType
from normfuse.quant.histogram import DyadicHistogram
from normfuse.quant.parameters import QuantParams, asymmetric, symmetric
from normfuse.quant.range_losses import Floats, Integers, RangeLoss, entropy_loss, squared_error_loss

__all__ = ["PERCENTILES", "Range", "RangeMethod", "candidates"]

PERCENTILES: Final = (99.9, 99.99, 99.999)
"""Percent of the values kept at each end (RepQ-ViT tries these three)."""

COARSE: Final = np.exp2(-np.arange(73) / 6)
"""Fractions of an end tried first: 12 octaves, 12 % apart; a factor 4096 reaches a single bin."""

FINE: Final = np.exp2(np.arange(-6, 7) / 42)
"""Factors tried around the best end, 1.7 % apart, up to the coarse neighbours."""


class RangeMethod(Enum):
    """How a range is chosen; the value is what recipes and reports write."""

    MIN_MAX = "min-max"
    PERCENTILE = "percentile"
    MSE = "mse"
    ENTROPY = "entropy"


@dataclass(frozen=True, slots=True)
class Range:
    """The real values that a quantizer covers.

    Raises:
        UsageError: an end is not finite, or the ends are in the wrong order.
    """

    minimum: float
    maximum: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.minimum) and math.isfinite(self.maximum) and self.minimum <= self.maximum):
            raise UsageError(f"a range from {self.minimum} to {self.maximum}", expected="finite, minimum <= maximum")

    @property
    def magnitude(self) -> float:
        """The larger of the two ends' absolute values."""
        return max(abs(self.minimum), abs(self.maximum))

    def quantizer(self, type: CodeType, *, is_symmetric: bool = False) -> QuantParams:
        """Return the parameters, per tensor, that cover the range."""
        if is_symmetric or isinstance(type, FloatType):
            return symmetric(self.magnitude, type)
        return asymmetric(self.minimum, self.maximum, type)


def candidates(
    histogram: DyadicHistogram,
    type: CodeType,
    *,
    is_symmetric: bool = False,
    methods: Iterable[RangeMethod] = tuple(RangeMethod),
) -> dict[str, Range]:
    """Return the ranges worth trying, by label: ``min-max``, ``percentile-99.9`` ... ``mse``, ``entropy``.

    All contain zero. They are deterministic, a function of the histogram's state alone. Which one is best for the
    network is the caller's question: it depends on what reads the tensor.

    Args:
        histogram: the observed values.
        type: the codes that the range will get.
        is_symmetric: whether the quantizer has zero point 0; the ranges are then ``-t ... t``.
        methods: which kinds to make.

    Raises:
        UsageError: nothing was observed.
    """
    if histogram.total == 0:
        raise UsageError("a range of a tensor that was never observed", expected="at least one sample")
    if isinstance(type, FloatType):  # small values lose nothing by large ones, so no range is worth clipping for them
        magnitude = max(-histogram.minimum, histogram.maximum)
        return {RangeMethod.MIN_MAX.value: Range(-magnitude, magnitude)}
    full = _shape(min(histogram.minimum, 0.0), max(histogram.maximum, 0.0), is_symmetric)
    found: dict[str, Range] = {}
    for method in methods:
        match method:
            case RangeMethod.MIN_MAX:
                found[method.value] = full
            case RangeMethod.PERCENTILE:
                for percent in PERCENTILES:
                    kept = Fraction(str(percent)) / 100  # 99.9 / 100 is above 0.999 and would keep one value more
                    found[f"{method.value}-{percent}"] = _percentile(histogram, kept, full, is_symmetric)
            case RangeMethod.MSE:
                loss = squared_error_loss(histogram, type, is_symmetric=is_symmetric)
                found[method.value] = _search(loss, full, is_symmetric)
            case RangeMethod.ENTROPY:
                found[method.value] = _search(entropy_loss(histogram, type), full, is_symmetric)
            case _:
                assert_never(method)
    return found


def _shape(minimum: float, maximum: float, is_symmetric: bool) -> Range:
    magnitude = max(-minimum, maximum)
    return Range(-magnitude, magnitude) if is_symmetric else Range(minimum, maximum)


def _percentile(histogram: DyadicHistogram, kept: Fraction, full: Range, is_symmetric: bool) -> Range:
    """Return the range that loses at most ``1 - kept`` of the values at each end (at both, if symmetric)."""
    half = histogram.bins // 2
    counts = histogram.counts
    if is_symmetric:
        counts = counts[half:] + counts[half - 1 :: -1]  # by magnitude; a bin includes its inner edge on either side
        upper = _bins_that_hold(counts, kept) * histogram.width
        return _shape(0.0, min(upper, full.maximum), is_symmetric)
    upper = (_bins_that_hold(counts, kept) - half) * histogram.width
    lower = (half - _bins_that_hold(counts[::-1], kept)) * histogram.width
    return Range(min(0.0, max(lower, full.minimum)), max(0.0, min(upper, full.maximum)))


def _bins_that_hold(counts: Integers, kept: Fraction) -> int:
    """Return how many bins from the front hold the share ``kept`` of the counts."""
    running = np.cumsum(counts)
    return int(np.searchsorted(running, math.ceil(kept * int(running[-1])))) + 1


def _search(loss: RangeLoss, full: Range, is_symmetric: bool) -> Range:
    """Return the range of least loss; ties keep the wider one."""
    if full.magnitude == 0:
        return full
    return _search_magnitude(loss, full.magnitude) if is_symmetric else _search_both_ends(loss, full)


def _search_magnitude(loss: RangeLoss, magnitude: float) -> Range:
    thresholds = magnitude * COARSE
    thresholds = np.minimum(thresholds[_best(loss(-thresholds, thresholds))] * FINE[::-1], magnitude)
    best = float(thresholds[_best(loss(-thresholds, thresholds))])
    return Range(-best, best)


def _search_both_ends(loss: RangeLoss, full: Range) -> Range:
    """Try both ends together first, then each alone, then all pairs nearby.

    The pairs matter at low widths, where the rounded zero point couples the ends.
    """
    thresholds = full.magnitude * COARSE
    lower, upper = np.maximum(-thresholds, full.minimum), np.minimum(thresholds, full.maximum)
    index = _best(loss(lower, upper))
    start = Range(float(lower[index]), float(upper[index]))
    coarse = _each_end(loss, start, full.minimum * COARSE, full.maximum * COARSE)
    fine_lower = np.maximum(coarse.minimum * FINE[::-1], full.minimum)
    fine_upper = np.minimum(coarse.maximum * FINE[::-1], full.maximum)
    lower, upper = (ends.ravel() for ends in np.meshgrid(np.unique(fine_lower), np.unique(fine_upper)[::-1]))
    index = _best(loss(lower, upper))
    return Range(float(lower[index]), float(upper[index]))


def _each_end(loss: RangeLoss, start: Range, lower: Floats, upper: Floats) -> Range:
    """Move each end to its best place while the other stands still; never worse than the start."""
    above = np.append(start.maximum, upper)
    maximum = float(above[_best(loss(np.full_like(above, start.minimum), above))])
    below = np.append(start.minimum, lower)
    minimum = float(below[_best(loss(below, np.full_like(below, maximum)))])
    return Range(minimum, maximum)


def _best(losses: Floats) -> int:
    return int(np.argmin(losses))
