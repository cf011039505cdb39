"""What calls of the integer operators are made of, and the code that an exact number has in their result."""

from __future__ import annotations

from fractions import Fraction
from math import floor
from typing import Any, Final

import hypothesis.strategies as st
import pytest
import torch
from torch import Tensor

from normfuse.testing import seeded

__all__ = [
    "ENDS",
    "MASK",
    "SEEDS",
    "WIDE",
    "WINDOWS",
    "Arguments",
    "any_codes",
    "any_numbers",
    "code",
    "codes_of",
    "half_up",
    "limits",
    "odd",
]

Arguments = dict[str, Any]

WIDE: Final = 1 << 62
"""What is shifted stays below this in magnitude: the contract of the operators."""

ODD: Final = (1, 7, 129, 1823)
MASK: Final = -(1 << 30)
ENDS: Final = {
    "int8": {"zero_point": -5, "minimum": -128, "maximum": 127},
    "relu": {"zero_point": -101, "minimum": -101, "maximum": 100},
    "int16": {"zero_point": 300, "minimum": -32768, "maximum": 32767},
    "int16 below 100": {"zero_point": 0, "minimum": -32768, "maximum": 100},
}
WINDOWS: Final = {
    "plain": {"stride": [1, 1], "padding": [0, 0], "dilation": [1, 1], "groups": 1},
    "strided": {"stride": [2, 3], "padding": [1, 2], "dilation": [1, 1], "groups": 1},
    "dilated": {"stride": [1, 2], "padding": [3, 2], "dilation": [3, 2], "groups": 2},
    "depthwise": {"stride": [1, 1], "padding": [1, 1], "dilation": [1, 1], "groups": 4},
}

SEEDS = st.integers(0, 2**32 - 1)
limits = pytest.mark.parametrize("ends", ENDS.values(), ids=ENDS.keys())
odd = pytest.mark.parametrize("size", ODD)


def half_up(value: Fraction) -> int:
    return floor(value + Fraction(1, 2))


def code(value: Fraction, ends: Arguments) -> int:
    """Return the code of a number in units of codes: rounded once, moved by the zero point, saturated."""
    return min(max(half_up(value) + ends["zero_point"], ends["minimum"]), ends["maximum"])


def codes_of(ends: Arguments) -> torch.dtype:
    return torch.int8 if ends["minimum"] >= -128 and ends["maximum"] < 128 else torch.int16


def any_codes(*shape: int, seed: int = 0, dtype: torch.dtype = torch.int8) -> Tensor:
    bounds = torch.iinfo(dtype)
    return torch.randint(bounds.min, bounds.max + 1, shape, generator=seeded(seed), dtype=dtype)


def any_numbers(*shape: int, limit: int = 1000, seed: int = 1) -> Tensor:
    return torch.randint(-limit, limit + 1, shape, generator=seeded(seed), dtype=torch.int32)
