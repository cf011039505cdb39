"""A streaming histogram whose state depends on the values alone, not on their order, batches or workers."""

from __future__ import annotations

import math
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from normfuse.errors import BadInput, UsageError

__all__ = ["DyadicHistogram"]

DEFAULT_BINS: Final = 1 << 14
"""128 KiB of counts. With one outlier, an 8-bit range is still chosen well up to some 4,000 deviations away
(``bins / 4`` bins then lie between zero and the outlier, so about one per deviation)."""

SMALLEST_EXPONENT: Final = -120
"""Bins are at least ``2 ** -120`` wide, so that scaling by the width's reciprocal stays finite in float32."""

CHUNK: Final = 1 << 16
"""Values binned at once: the temporaries then stay in a core's cache whatever the tensor's size."""


class DyadicHistogram:
    """Counts of values in bins of width ``2 ** exponent``, aligned at zero.

    Bin ``i`` holds ``i * width <= x < (i + 1) * width`` for ``-bins / 2 <= i < bins / 2``. The exponent is the smallest
    at which the exact minimum and maximum fit; when it grows, neighbours are merged pairwise. Because
    ``floor(floor(x / 2**k) / 2) == floor(x / 2**(k + 1))``, no rounding ever happens, and any order, split or merging
    of the same values ends in the same state. Memory is bounded by the bins. (Ours.)

    Attributes:
        bins: how many bins, a power of two.
        exponent: the binary logarithm of the width.
        counts: int64 [bins]; bin ``i`` stands at ``i + bins / 2``.
        minimum: the smallest value seen, exactly; +inf before the first.
        maximum: the largest value seen, exactly; -inf before the first.
    """

    __slots__ = ("bins", "counts", "exponent", "maximum", "minimum")

    def __init__(self, *, bins: int = DEFAULT_BINS) -> None:
        if bins < 2 or bins & (bins - 1):
            raise UsageError(f"a histogram of {bins} bins", expected="a power of two")
        self.bins = bins
        self.exponent = SMALLEST_EXPONENT
        self.counts: NDArray[np.int64] = np.zeros(bins, dtype=np.int64)
        self.minimum = math.inf
        self.maximum = -math.inf

    def __eq__(self, other: object) -> bool:
        return isinstance(other, DyadicHistogram) and self._key() == other._key()

    __hash__ = None  # type: ignore[assignment]  # it changes, so it cannot be a key

    def __repr__(self) -> str:
        return (
            f"DyadicHistogram(total={self.total}, minimum={self.minimum}, maximum={self.maximum}, width={self.width})"
        )

    @property
    def width(self) -> float:
        """The width of a bin."""
        return math.ldexp(1.0, self.exponent)

    @property
    def total(self) -> int:
        """How many values were seen."""
        return int(self.counts.sum())

    def edges(self) -> NDArray[np.float64]:
        """Return the ends of the bins in order, [bins + 1], exact."""
        return np.ldexp(np.arange(-(self.bins // 2), self.bins // 2 + 1, dtype=np.float64), self.exponent)

    def update(self, values: Tensor, *, where: str = "") -> None:
        """Count every element of a tensor of any shape, type and device.

        Args:
            values: what was observed.
            where: the tensor's place in the user's model, for the message.

        Raises:
            BadInput: a value is NaN or infinite; the state is then unchanged.
        """
        if values.numel() == 0:
            return
        flat = _as_float(values.detach()).reshape(-1)
        low, high = (float(end) for end in torch.aminmax(flat))
        if not (math.isfinite(low) and math.isfinite(high)):
            raise BadInput(
                "an observed tensor holds NaN or infinity",
                where=where,
                expected="finite values",
                hint="run the float model on the same samples: its own output is then not finite either",
            )
        self._cover(low, high)
        for chunk in torch.split(flat, CHUNK):
            self.counts += self._count(chunk)

    def merge(self, other: DyadicHistogram) -> None:
        """Count everything that ``other`` has seen; ``other`` is not changed.

        Raises:
            UsageError: the numbers of bins differ.
        """
        if other.bins != self.bins:
            raise UsageError(
                f"histograms of {self.bins} and {other.bins} bins cannot be merged", expected="the same bins"
            )
        self._cover(other.minimum, other.maximum)
        self.counts += _widened(other.counts, self.exponent - other.exponent)

    def _key(self) -> tuple[int, int, float, float, bytes]:
        return self.bins, self.exponent, self.minimum, self.maximum, self.counts.tobytes()

    def _cover(self, low: float, high: float) -> None:
        # `+ 0.0` makes one zero of the two, which compare equal and would otherwise depend on the order.
        self.minimum = min(self.minimum, low) + 0.0
        self.maximum = max(self.maximum, high) + 0.0
        exponent = max(self.exponent, _needed_exponent(self.minimum, self.maximum, self.bins))
        self.counts = _widened(self.counts, exponent - self.exponent)
        self.exponent = exponent

    def _count(self, values: Tensor) -> NDArray[np.int64]:
        # A power of two only moves the exponent, so the quotient is exact unless it underflows (widths above 1 alone).
        narrowest = torch.int16 if self.bins <= 1 << 15 else torch.int32
        bins = (values * math.ldexp(1.0, -self.exponent)).floor_().to(narrowest)
        if self.exponent > 0:
            bins -= ((values < 0) & (bins == 0)).to(narrowest)  # what has underflowed still has its sign
        counts = torch.bincount(bins.add_(self.bins // 2), minlength=self.bins)
        return np.asarray(counts.cpu().numpy(), dtype=np.int64)


def _as_float(values: Tensor) -> Tensor:
    """Return the values in float32 or float64, unchanged."""
    if values.dtype in (torch.float32, torch.float64):
        return values
    return values.to(torch.float32 if values.is_floating_point() else torch.float64)


def _needed_exponent(minimum: float, maximum: float, bins: int) -> int:
    """Return the smallest exponent at which both ends fall into a bin."""
    half = bins.bit_length() - 2  # bins / 2 == 2 ** half
    mantissa_low, exponent_low = math.frexp(min(minimum, 0.0))
    _, exponent_high = math.frexp(max(maximum, 0.0))
    # The negative side includes its last edge (-2 ** n), the positive one does not.
    exponent_low -= mantissa_low == -0.5
    ends = [exponent_low if minimum < 0 else None, exponent_high if maximum > 0 else None]
    return max([SMALLEST_EXPONENT, *(end - half for end in ends if end is not None)])


def _widened(counts: NDArray[np.int64], steps: int) -> NDArray[np.int64]:
    """Return the counts in bins ``2 ** steps`` times as wide."""
    if steps == 0:
        return counts
    half = counts.size // 2
    target = (np.arange(-half, half, dtype=np.int64) >> min(steps, 63)) + half
    widened = np.zeros_like(counts)
    np.add.at(widened, target, counts)
    return widened
