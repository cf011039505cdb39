from __future__ import annotations

import pytest
import torch

from normfuse.errors import UsageError
from normfuse.quant import INT4, INT8, INT8_NARROW, INT16, INT32, UINT4, UINT8, IntegerType, PerChannel, PerGroup


@pytest.mark.parametrize(
    ("kind", "minimum", "maximum", "levels", "dtype"),
    [
        (INT4, -8, 7, 16, torch.int8),
        (UINT4, 0, 15, 16, torch.uint8),
        (INT8, -128, 127, 256, torch.int8),
        (INT8_NARROW, -127, 127, 255, torch.int8),
        (UINT8, 0, 255, 256, torch.uint8),
        (IntegerType(7, signed=False), 0, 127, 128, torch.uint8),
        (IntegerType(9, signed=True), -256, 255, 512, torch.int16),
        (IntegerType(9, signed=False), 0, 511, 512, torch.uint16),
        (INT16, -32768, 32767, 65536, torch.int16),
        (IntegerType(17, signed=False), 0, 131071, 131072, torch.int32),
        (INT32, -(2**31), 2**31 - 1, 2**32, torch.int32),
        (IntegerType(32, signed=False), 0, 2**32 - 1, 2**32, torch.int64),
    ],
    ids=str,
)
def test_limits_and_container(kind: IntegerType, minimum: int, maximum: int, levels: int, dtype: torch.dtype) -> None:
    assert (kind.minimum, kind.maximum, kind.levels, kind.torch_dtype) == (minimum, maximum, levels, dtype)


@pytest.mark.parametrize("bits", [-1, 0, 1, 33])
def test_impossible_widths_cannot_be_built(bits: int) -> None:
    with pytest.raises(UsageError, match=f"{bits} bits"):
        IntegerType(bits, signed=True)


def test_unsigned_narrow_cannot_be_built() -> None:
    with pytest.raises(UsageError, match="narrow"):
        IntegerType(8, signed=False, narrow=True)


def test_axes_are_counted_from_the_front() -> None:
    with pytest.raises(UsageError, match="-1"):
        PerChannel(-1)
    with pytest.raises(UsageError, match="-2"):
        PerGroup(-2, 32)


def test_groups_hold_something() -> None:
    with pytest.raises(UsageError, match="groups of 0"):
        PerGroup(1, 0)


def test_names() -> None:
    assert [str(kind) for kind in (INT8, UINT4, INT8_NARROW)] == ["int8", "uint4", "int8-narrow"]
