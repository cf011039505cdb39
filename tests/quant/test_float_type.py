"""How types of codes are written and read again, and what the 8-bit floats are."""

from __future__ import annotations

import pytest
import torch

from normfuse.errors import NormfuseError
from normfuse.quant import IntegerType
from normfuse.quant.float_type import FLOAT8, CodeType, FloatType, code_type

INTEGERS = [
    IntegerType(bits, signed=signed, narrow=narrow)
    for bits in range(2, 33)
    for signed, narrow in ((True, False), (True, True), (False, False))
]


@pytest.mark.parametrize("kind", [FLOAT8, *INTEGERS], ids=str)
def test_a_type_is_read_as_it_was_written(kind: CodeType) -> None:
    assert code_type(str(kind)) == kind


def test_no_two_types_are_written_alike() -> None:
    assert len({str(kind) for kind in (FLOAT8, *INTEGERS)}) == len(INTEGERS) + 1


@pytest.mark.parametrize(
    "text",
    [
        *("", "float", "float16", "Float8", "float8 ", "float8-narrow", "int", "8", "int8 ", " int8", "int8-wide"),
        *("uint8\n", "sint8", "int-8", "int8.0", "int1", "int33", "uint8-narrow", "int8-narrow-narrow", "INT8", "int٨"),
    ],
)
def test_what_is_no_type_is_refused(text: str) -> None:
    with pytest.raises(NormfuseError):
        code_type(text)


def test_there_is_one_type_of_floats_with_the_limits_of_torch() -> None:
    limits = torch.finfo(FLOAT8.torch_dtype)
    assert FloatType() == FLOAT8
    assert (FLOAT8.minimum, FLOAT8.maximum, FLOAT8.bits) == (limits.min, limits.max, limits.bits)
    assert FLOAT8.signed
    assert torch.zeros(1, dtype=FLOAT8.torch_dtype).element_size() * 8 == FLOAT8.bits
