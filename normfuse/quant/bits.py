"""How many bits weights and activations get, and how that is written."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final, Self

from normfuse.errors import UsageError

__all__ = ["FLOAT", "LEAST", "MOST", "MOST_GROUPED", "Bits"]

FLOAT: Final = 32
"""Bits of what stays float; 16 means the same for activations, as in ``w4a16``."""

EXPECTED: Final = (
    "8 (W8A8), 4 (4-bit weights), w4a4, w6a6, w4a16 ... (2 to 8 bits, a16: float), mixed, 32 (folded float), "
    "or of --target trt fp8, fp16, bf16"
)
LEAST, MOST = 2, 8

MOST_GROUPED: Final = 4
"""Bits of weights behind float activations that have groups, and with them room for zero points."""


@dataclass(frozen=True, slots=True)
class Bits:
    """Bits of weights and of activations; 32 stands for float.

    Raises:
        UsageError: a width that no quantizer has, or quantized activations in front of float weights.
    """

    weight: int
    activation: int

    def __post_init__(self) -> None:
        is_known = all(LEAST <= bits <= MOST or bits == FLOAT for bits in (self.weight, self.activation))
        if not is_known or (self.weight == FLOAT and self.activation != FLOAT):
            raise UsageError(f"bits cannot be w{self.weight}a{self.activation}", where="recipe", expected=EXPECTED)

    @property
    def is_float(self) -> bool:
        """Whether nothing is quantized."""
        return self.weight == FLOAT

    @property
    def is_weight_only(self) -> bool:
        """Whether activations stay float behind quantized weights."""
        return self.activation == FLOAT and not self.is_float

    @classmethod
    def parse(cls, value: object) -> Self:
        """Return the bits that a number or text says: ``8`` is W8A8, ``4`` W4A8, ``w4a16`` 4-bit weights alone.

        One number below 8 gives the weights that many bits and the activations what targets run, 8.

        Raises:
            UsageError: it is neither; the message says what is.
        """
        text = str(int(value)) if isinstance(value, float) and value.is_integer() else str(value).strip().lower()
        if not isinstance(value, bool) and (found := re.fullmatch(r"w(\d+)a(\d+)|(\d+)", text)):
            weight, activation, both = found.groups()
            if both is not None:
                return cls(int(both), FLOAT if int(both) == FLOAT else MOST)
            return cls(int(weight), FLOAT if int(activation) in (16, FLOAT) else int(activation))
        raise UsageError(f"bits cannot be {value!r}", where="recipe", expected=EXPECTED)

    @property
    def label(self) -> str:
        """How reports call an engine of these bits."""
        if self.is_float:
            return "float"
        return "int8" if self.weight == self.activation == MOST else str(self)

    @property
    def spelled(self) -> str:
        """Both widths, as in tables that compare layers: ``w8a8``."""
        return "float" if self.is_float else f"w{self.weight}a{16 if self.is_weight_only else self.activation}"

    def __str__(self) -> str:
        if self.is_float:
            return str(FLOAT)
        return str(MOST) if self.weight == self.activation == MOST else self.spelled
