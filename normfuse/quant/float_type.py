"""The 8-bit floats that tensors are quantized to, beside integers; and how types of codes are written."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar, Final

import torch

from normfuse.errors import InternalError
from normfuse.quant.integer_type import IntegerType

__all__ = ["FLOAT8", "CodeType", "FloatType", "code_type"]


@dataclass(frozen=True, slots=True)
class FloatType:
    """Floats with 4 bits of exponent and 3 of mantissa, without infinities (E4M3FN of OCP's 8-bit formats)."""

    bits: ClassVar[int] = 8
    signed: ClassVar[bool] = True
    minimum: ClassVar[int] = -448
    maximum: ClassVar[int] = 448
    torch_dtype: ClassVar[torch.dtype] = torch.float8_e4m3fn

    def __str__(self) -> str:
        return "float8"


FLOAT8: Final = FloatType()
CodeType = IntegerType | FloatType


def code_type(text: str) -> CodeType:
    """Return the type that is written so.

    Raises:
        InternalError: nothing is.
    """
    if text == str(FLOAT8):
        return FLOAT8
    found = re.fullmatch(r"(u?)int([0-9]+)(-narrow)?", text)
    if found is None:
        raise InternalError(f"{text} is no type of codes", where="code_type")
    unsigned, bits, narrow = found.groups()
    return IntegerType(int(bits), signed=not unsigned, narrow=narrow is not None)
