"""Bits as they are written, and what they mean."""

from __future__ import annotations

from typing import Any

import pytest

from normfuse.errors import UsageError
from normfuse.quant.bits import FLOAT, Bits


@pytest.mark.parametrize(
    ("written", "weight", "activation", "text", "label"),
    [
        (8, 8, 8, "8", "int8"),
        ("8", 8, 8, "8", "int8"),
        (4, 4, 8, "w4a8", "w4a8"),
        (6.0, 6, 8, "w6a8", "w6a8"),
        ("W4A4", 4, 4, "w4a4", "w4a4"),
        ("w8a8", 8, 8, "8", "int8"),
        ("w3a16", 3, FLOAT, "w3a16", "w3a16"),
        ("w3a32", 3, FLOAT, "w3a16", "w3a16"),
        (32, FLOAT, FLOAT, "32", "float"),
        ("w32a32", FLOAT, FLOAT, "32", "float"),
    ],
)
def test_what_is_written_is_read(written: Any, weight: int, activation: int, text: str, label: str) -> None:
    found = Bits.parse(written)
    assert (found.weight, found.activation) == (weight, activation)
    assert (str(found), found.label) == (text, label)
    assert Bits.parse(str(found)) == found
    assert found.is_weight_only == (weight < FLOAT == activation)


@pytest.mark.parametrize("written", [1, 9, 16, 31, "w9a8", "w4a9", "w32a8", "a8", "", "eight", True, None, 4.5, "-4"])
def test_anything_else_is_refused(written: Any) -> None:
    with pytest.raises(UsageError, match="bits cannot be"):
        Bits.parse(written)
