"""Whatever is rescaled is rounded once, to the code that exact fractions have."""

from __future__ import annotations

from fractions import Fraction

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from integer_calls import SEEDS, WIDE, Arguments, any_codes, any_numbers, code, codes_of, half_up, limits, odd
from onnx_calls import torch_result
from torch import Tensor

from normfuse.kernels.reference import rescale

INT32 = st.integers(-(2**31), 2**31 - 1)


def exact_codes(numerators: Tensor, shift: int, ends: Arguments) -> list[int]:
    return [code(Fraction(each, 1 << shift), ends) for each in numerators.flatten().tolist()]


@limits
@given(x=INT32, bias=INT32, multiplier=INT32, shift=st.integers(1, 62))
@settings(max_examples=300)
def test_rescale_rounds_once(ends: Arguments, x: int, bias: int, multiplier: int, shift: int) -> None:
    if abs((x + bias) * multiplier) >= WIDE:
        multiplier //= 4
    given_ = (
        torch.tensor([[x]]),
        torch.tensor([bias], dtype=torch.int32),
        torch.tensor([multiplier], dtype=torch.int32),
    )
    found = rescale(*given_, shift, *ends.values())
    assert found.dtype == codes_of(ends)
    assert found.tolist() == [[code(Fraction((x + bias) * multiplier, 1 << shift), ends)]]


@given(odd_halves=st.integers(-255, 254), shift=st.integers(1, 40), off=st.sampled_from([-1, 0, 1]))
def test_halves_are_rounded_up(odd_halves: int, shift: int, off: int) -> None:
    numerator = ((2 * odd_halves + 1) << (shift - 1)) + (off if shift > 1 else 0)
    none, one = torch.zeros((), dtype=torch.int32), torch.ones((), dtype=torch.int32)
    found = int(rescale(torch.tensor(numerator), none, one, shift, 0, -32768, 32767))
    assert found == (odd_halves if shift > 1 and off < 0 else odd_halves + 1)


@pytest.mark.parametrize(("maximum", "dtype"), [(127, torch.int8), (6, torch.int8), (128, torch.int16)])
def test_maximum_decides_the_type(maximum: int, dtype: torch.dtype) -> None:
    none, one = torch.zeros((), dtype=torch.int32), torch.ones((), dtype=torch.int32)
    found = rescale(torch.tensor([1 << 40, -(1 << 40), 0]), none, one, 1, 2, -100, maximum)
    assert found.dtype == dtype
    assert found.tolist() == [maximum, -100, 2]


@limits
@pytest.mark.parametrize("dtype", [torch.int8, torch.int16], ids=str)
@given(seed=SEEDS, first=st.integers(-(2**46), 2**46), second=st.integers(-(2**46), 2**46), shift=st.integers(1, 62))
@settings(max_examples=20)
def test_sums_are_exact(ends: Arguments, dtype: torch.dtype, seed: int, first: int, second: int, shift: int) -> None:
    first, second = first // 4, second // 4
    x, y, offset = (
        any_codes(4, 33, seed=seed, dtype=dtype),
        any_codes(33, seed=seed + 1, dtype=dtype),
        -(1 << shift) // 3,
    )
    pair = {"x": x, "y": y, "x_multiplier": first, "y_multiplier": second, "offset": offset, "shift": shift}
    found = torch_result("int_add", pair | ends)
    assert found.dtype == codes_of(ends)
    exact = x.to(torch.int64) * first + y.to(torch.int64) * second + offset
    assert found.flatten().tolist() == exact_codes(exact, shift, ends)


@limits
@pytest.mark.parametrize("dtype", [torch.int8, torch.int16], ids=str)
@given(seed=SEEDS, multiplier=st.integers(-(2**29), 2**29), shift=st.integers(1, 62))
@settings(max_examples=20)
def test_products_are_exact(ends: Arguments, dtype: torch.dtype, seed: int, multiplier: int, shift: int) -> None:
    x, y = any_codes(4, 33, seed=seed, dtype=dtype), any_codes(33, seed=seed + 1, dtype=dtype)
    call = {"x": x, "y": y, "x_zero_point": -128, "y_zero_point": 127, "multiplier": multiplier, "shift": shift}
    found = torch_result("int_multiply", call | ends)
    exact = (x.to(torch.int64) + 128) * (y.to(torch.int64) - 127) * multiplier
    assert found.flatten().tolist() == exact_codes(exact, shift, ends)


@limits
@odd
@pytest.mark.parametrize("dtype", [torch.int8, torch.int16], ids=str)
@pytest.mark.parametrize("axes", [[0], [-1], [2, 0], [0, 1, 2]], ids=str)
def test_means_are_exact(ends: Arguments, size: int, dtype: torch.dtype, axes: list[int]) -> None:
    """Rescaled exactly; and the mean's own nearest code, unless the mean is within 2^-15 of a half.

    The multiplier is at least 2^30 and off by 1/2, so a mean up to 2^15 + 11 is off by less than 2^-15.
    """
    x, zero = any_codes(2, 3, size, dtype=dtype), 11
    count = x.numel() // x.sum(axes).numel()
    shift = 30 + count.bit_length()
    mean: Arguments = {
        "x": x,
        "axes": axes,
        "offset": -zero * count,
        "multiplier": half_up(Fraction(1 << shift, count)),
        "shift": shift,
    }
    for keeps_axes in (False, True):
        found = torch_result("int_mean", mean | {"keeps_axes": keeps_axes} | ends)
        total = x.to(torch.int64).sum(axes, keepdim=keeps_axes) - zero * count
        assert found.shape == total.shape
        assert found.flatten().tolist() == exact_codes(total * mean["multiplier"], shift, ends)
        nearest = [Fraction(each, count) for each in total.flatten().tolist()]
        off = [
            abs(half_up(each) - half_up(Fraction(each * count * mean["multiplier"], 1 << shift))) for each in nearest
        ]
        assert all(
            d == 0 or abs(each % 1 - Fraction(1, 2)) < Fraction(1, 1 << 15)
            for d, each in zip(off, nearest, strict=True)
        )


@limits
@pytest.mark.parametrize("vector", [(), (7,), (3, 1), (2, 3, 7)], ids=str)
def test_requantize_broadcasts(ends: Arguments, vector: tuple[int, ...]) -> None:
    x, bias = any_codes(2, 3, 7, dtype=torch.int16), any_numbers(*vector, limit=2**20)
    multiplier = any_numbers(*vector, limit=2**31 - 1, seed=2)
    found = torch_result("requantize", {"x": x, "bias": bias, "multiplier": multiplier, "shift": 40} | ends)
    exact = (x.to(torch.int64) + bias) * multiplier.to(torch.int64)
    assert found.flatten().tolist() == exact_codes(exact, 40, ends)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16], ids=str)
def test_table_holds_a_function_of_every_code(dtype: torch.dtype) -> None:
    step = 1 if dtype == torch.int8 else 255
    table = torch.tensor([step * (each // 2) for each in range(-128, 128)]).to(dtype)
    x = torch.arange(127, -129, -1).to(torch.int8)
    found = torch_result("int_table", {"x": x, "table": table})
    assert found.dtype == dtype
    assert found.tolist() == [step * (each // 2) for each in x.tolist()]
