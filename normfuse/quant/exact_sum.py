"""A sum of float64 values that does not depend on their order."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Final

from normfuse.errors import BadInput

__all__ = ["ExactSum"]

SMALLEST_EXPONENT: Final = 1074
"""Every finite float64 is an integer multiple of ``2 ** -1074``, its smallest subnormal."""


class ExactSum:
    """A running sum, exact: choices made from it never depend on the order of samples or on how workers share them.

    The sum is one Python integer in units of ``2 ** -1074`` (at most some 2,200 bits).
    """

    __slots__ = ("_units", "count")

    def __init__(self) -> None:
        self._units = 0
        self.count = 0
        """How many values were added."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ExactSum) and (self._units, self.count) == (other._units, other.count)

    __hash__ = None  # type: ignore[assignment]  # it changes, so it cannot be a key

    def __repr__(self) -> str:
        return f"ExactSum({self.value()!r}, count={self.count})"

    def add(self, value: float) -> None:
        """Add one value.

        Raises:
            BadInput: the value is NaN or infinite.
        """
        if not math.isfinite(value):
            raise BadInput(f"cannot add {value} to a sum", expected="a finite number")
        numerator, denominator = float(value).as_integer_ratio()
        self._units += numerator << (SMALLEST_EXPONENT - (denominator.bit_length() - 1))
        self.count += 1

    def merge(self, other: ExactSum) -> None:
        """Add everything that ``other`` has seen."""
        self._units += other._units
        self.count += other.count

    def value(self) -> float:
        """Return the sum, rounded once to the nearest float64 (infinity where it is too large for one)."""
        return _nearest(self._units, 1)

    def mean(self) -> float:
        """Return the mean, rounded once; 0 of nothing."""
        return _nearest(self._units, self.count) if self.count else 0.0


def _nearest(units: int, parts: int) -> float:
    try:
        return float(Fraction(units, parts << SMALLEST_EXPONENT))
    except OverflowError:
        return math.inf if units > 0 else -math.inf
