"""Ratios as multipliers and shifts: nearest of all, of the asked length, never beyond what is shifted."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from normfuse.errors import UnsupportedModel
from normfuse.quant.dyadic import ACCUMULATOR, LARGEST_SHIFT, WIDE, dyadic, dyadic_at, require_below

FRACTIONS = st.floats(-1, 1, exclude_min=True, exclude_max=True, allow_subnormal=False)
WIDTHS = st.integers(2, 46)


def ratios(fractions: list[float], exponent: int, bits: int = 31) -> torch.Tensor:
    """Return ratios that leave a shift: below the largest multiplier, halved."""
    largest = math.ldexp((1 << bits) - 1, -1)
    scaled = [math.ldexp(each, exponent) for each in fractions]
    return torch.tensor([min(max(each, -largest), largest) for each in scaled], dtype=torch.float64)


@given(st.lists(FRACTIONS, min_size=1, max_size=9), st.integers(-70, 45), WIDTHS)
def test_every_multiplier_is_the_nearest(fractions: list[float], exponent: int, bits: int) -> None:
    wanted = ratios(fractions, exponent, bits)
    multipliers, shift = dyadic(wanted, bits=bits)
    assert multipliers.dtype == torch.int64
    assert multipliers.shape == wanted.shape
    error = (multipliers.double() * 2.0**-shift - wanted).abs()  # exact: a float64 has 53 bits, multipliers have 46
    assert (error <= 2.0 ** -(shift + 1)).all()


@given(st.lists(FRACTIONS, min_size=1, max_size=9), st.integers(-70, 45), WIDTHS)
def test_the_largest_multiplier_has_the_bits_and_the_shift_is_one(
    fractions: list[float], exponent: int, bits: int
) -> None:
    multipliers, shift = dyadic(ratios(fractions, exponent, bits), bits=bits)
    assert 1 <= shift <= LARGEST_SHIFT
    largest = int(multipliers.abs().max())
    assert largest < 1 << bits
    assert largest >= 1 << (bits - 1) or shift == LARGEST_SHIFT or not any(fractions)


@given(WIDTHS, st.integers(-40, 40), st.integers(0, 3))
def test_ratios_just_below_a_power_of_two(bits: int, exponent: int, units: int) -> None:
    """They are rounded up to one more bit than there is, and shifted once less."""
    below = math.nextafter(2.0, 0) - units * 2.0**-52
    ratio = torch.tensor(math.ldexp(below, min(exponent, bits - 1) - 2), dtype=torch.float64)
    multiplier, shift = dyadic(ratio, bits=bits)
    assert 1 <= shift <= LARGEST_SHIFT
    assert int(multiplier) < 1 << bits
    assert abs(float(multiplier) * 2.0**-shift - float(ratio)) <= 2.0 ** -(shift + 1)


@pytest.mark.parametrize("bits", [2, 31, 46])
def test_a_ratio_that_is_rounded_up_where_no_shift_is_left(bits: int) -> None:
    """What is shifted by nothing is not rounded: ``rounded_shift`` takes 1 or more."""
    ratio = torch.tensor(math.nextafter(2.0 ** (bits - 1), 0), dtype=torch.float64)
    with pytest.raises(ValueError, match=f"{bits} bits"):
        dyadic(ratio, bits=bits)


@given(st.lists(FRACTIONS, min_size=1, max_size=9), st.integers(-40, 30))
def test_signs_are_kept(fractions: list[float], exponent: int) -> None:
    wanted = ratios(fractions, exponent)
    (positive, shift), (negative, other) = dyadic(wanted), dyadic(-wanted)
    assert shift == other
    assert torch.equal(positive, -negative)
    assert ((positive.sign() == wanted.sign()) | (positive == 0)).all()


def test_one_is_exact() -> None:
    multiplier, shift = dyadic(torch.tensor(1.0, dtype=torch.float64))
    assert (int(multiplier), shift) == (1 << 30, 30)


@pytest.mark.parametrize("shape", [(), (3,), (2, 1, 4), (0,)])
def test_zeros(shape: tuple[int, ...]) -> None:
    multipliers, shift = dyadic(torch.zeros(shape, dtype=torch.float64))
    assert multipliers.shape == shape
    assert not multipliers.any()
    assert shift >= 1


@pytest.mark.parametrize("ratio", [1e-300, 5e-324, 2.0**-62])
def test_of_tiny_ratios_nothing_is_left(ratio: float) -> None:
    multiplier, shift = dyadic(torch.tensor([ratio, -ratio], dtype=torch.float64))
    assert shift == LARGEST_SHIFT
    assert multiplier.tolist() == [0, 0]


def test_small_ratios_lose_bits_beside_large_ones() -> None:
    multipliers, shift = dyadic(torch.tensor([1.0, 2.0**-20, 2.0**-40], dtype=torch.float64))
    assert shift == 30
    assert multipliers.tolist() == [1 << 30, 1 << 10, 0]


@pytest.mark.parametrize("ratio", [2.0**30, -(2.0**30), 1e300, math.inf, -math.inf, math.nan])
def test_what_no_shift_is_left_for_is_our_bug(ratio: float) -> None:
    with pytest.raises(ValueError, match="31 bits"):
        dyadic(torch.tensor([1.0, ratio], dtype=torch.float64))


@pytest.mark.parametrize("bits", [2, 30, 46])
def test_the_largest_ratios(bits: int) -> None:
    limit = 2.0 ** (bits - 1)
    multiplier, shift = dyadic(torch.tensor(limit * 0.75, dtype=torch.float64), bits=bits)
    assert (int(multiplier), shift) == (3 << (bits - 2), 1)
    with pytest.raises(ValueError, match=f"{bits} bits"):
        dyadic(torch.tensor(limit, dtype=torch.float64), bits=bits)


@given(st.lists(FRACTIONS, min_size=1, max_size=9), st.integers(1, 46))
def test_multipliers_at_a_given_shift_are_the_nearest(fractions: list[float], shift: int) -> None:
    wanted = ratios(fractions, 3)
    error = dyadic_at(wanted, shift).double() * 2.0**-shift - wanted
    assert (error.abs() <= 2.0 ** -(shift + 1)).all()


@pytest.mark.parametrize("limit", [ACCUMULATOR, WIDE])
def test_what_could_overflow_is_refused_by_its_layer(limit: int) -> None:
    require_below(limit - limit / 1024, limit, what="a sum", where="blocks.0.fc1")
    for largest in (limit, 3.0 * limit, math.inf):
        with pytest.raises(UnsupportedModel) as refusal:
            require_below(largest, limit, what="a sum", where="blocks.0.fc1")
        assert refusal.value.where == "blocks.0.fc1"
        assert refusal.value.what.startswith("a sum could reach ")
        assert refusal.value.expected == f"less than 2^{round(math.log2(limit))}"
