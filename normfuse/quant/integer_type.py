"""The integer types that tensors are quantized to, as small checked values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch

from normfuse.errors import UsageError

__all__ = ["INT4", "INT8", "INT8_NARROW", "INT16", "INT32", "UINT4", "UINT8", "IntegerType", "smallest_container"]


@dataclass(frozen=True, slots=True)
class IntegerType:
    """A range of integers, 2 to 32 bits wide.

    ``narrow`` drops the smallest code of a signed type, so that the range is symmetric (int8: -127 ... 127).

    Raises:
        UsageError: the width is outside 2 ... 32, or an unsigned type is narrow.
    """

    bits: int
    signed: bool
    narrow: bool = False

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 32:
            raise UsageError(f"an integer type of {self.bits} bits", expected="2 to 32 bits")
        if self.narrow and not self.signed:
            raise UsageError("an unsigned integer type cannot be narrow", expected="signed=True")

    def __str__(self) -> str:
        return f"{'' if self.signed else 'u'}int{self.bits}{'-narrow' if self.narrow else ''}"

    @property
    def minimum(self) -> int:
        """The smallest code."""
        return -(1 << (self.bits - 1)) + self.narrow if self.signed else 0

    @property
    def maximum(self) -> int:
        """The largest code."""
        return (1 << (self.bits - 1)) - 1 if self.signed else (1 << self.bits) - 1

    @property
    def levels(self) -> int:
        """The number of codes."""
        return self.maximum - self.minimum + 1

    @property
    def torch_dtype(self) -> torch.dtype:
        """The smallest torch dtype that holds every code."""
        return smallest_container(self.minimum, self.maximum)


_CONTAINERS: Final = (torch.uint8, torch.int8, torch.uint16, torch.int16, torch.int32, torch.int64)


def smallest_container(minimum: int, maximum: int) -> torch.dtype:
    """Return the smallest torch dtype that holds ``minimum ... maximum``; unsigned exactly where ``minimum >= 0``.

    Unsigned ranges wider than 16 bits have no well supported torch dtype and go to a wider signed one.
    """
    for dtype in _CONTAINERS:
        limits = torch.iinfo(dtype)
        fits = limits.min <= minimum and maximum <= limits.max
        if fits and (minimum < 0 or limits.min == 0 or limits.bits > 16):
            return dtype
    raise UsageError(f"no integer type holds {minimum} ... {maximum}", expected="at most 32 bits")


INT4: Final = IntegerType(4, signed=True)
UINT4: Final = IntegerType(4, signed=False)
INT8: Final = IntegerType(8, signed=True)
INT8_NARROW: Final = IntegerType(8, signed=True, narrow=True)
UINT8: Final = IntegerType(8, signed=False)
INT16: Final = IntegerType(16, signed=True)
INT32: Final = IntegerType(32, signed=True)
