"""Codes and factors of tokens beside exact numbers, and the norm that they are together."""

from __future__ import annotations

from fractions import Fraction
from math import ceil, isqrt, log2

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from integer_calls import Arguments, any_codes, any_numbers, half_up, limits, odd
from onnx_calls import torch_result
from torch import Tensor

from normfuse.testing import seeded

centred = pytest.mark.parametrize("is_centred", [True, False], ids=["layer norm", "RMS norm"])
FRACTION = 20


def rows(channels: int) -> Tensor:
    """Return tokens of many sizes and means, constant ones, single outliers and alternating corners."""
    generator = seeded(channels)
    spreads = torch.tensor([0.5, 3.0, 100.0, 8000.0, 32767.0], dtype=torch.float64)[:, None]
    means = torch.tensor([0.0, -7.0, 20000.0], dtype=torch.float64)[:, None, None]
    drawn = torch.randn(3, 5, channels, generator=generator, dtype=torch.float64) * spreads + means
    found = [*drawn.flatten(0, 1).round().clamp(-32768, 32767)]
    found += [torch.full((channels,), float(each)) for each in (-32768, -1, 0, 1, 32767)]
    found += [found[-1].clone(), torch.zeros(channels)]
    found[-2][::2], found[-1][channels // 2] = -32768, -32768
    return torch.stack([each.double() for each in found]).to(torch.int16)


def deviations(x: Tensor, is_centred: bool) -> Tensor:
    """Return exact integers: channels times x, less its sum if it is centred."""
    wide = x.to(torch.int64)
    return wide * x.shape[-1] - (wide.sum(-1, keepdim=True) if is_centred else 0)


@odd
@centred
def test_codes_are_the_nearest(size: int, is_centred: bool) -> None:
    x = rows(size)
    found = torch_result("int_token_codes", {"x": x, "is_centred": is_centred})
    assert found.dtype == torch.int8
    for token, made in zip(deviations(x, is_centred).tolist(), found.tolist(), strict=True):
        largest = max(map(abs, token)) or 1
        assert made == [half_up(Fraction(127 * each, largest)) for each in token]


@centred
@given(values=st.lists(st.integers(-32768, 32767), min_size=1, max_size=9), gain=st.integers(1, 1 << 20))
def test_a_norm_does_not_change_codes(is_centred: bool, values: list[int], gain: int) -> None:
    """Codes of d / r are those of d, whatever r is."""
    token = deviations(torch.tensor([values], dtype=torch.int16), is_centred)[0].tolist()
    made = torch_result("int_token_codes", {"x": torch.tensor([values], dtype=torch.int16), "is_centred": is_centred})
    normed = [Fraction(each, gain) for each in token]
    largest = max(map(abs, normed)) or Fraction(1)
    assert made[0].tolist() == [half_up(127 * each / largest) for each in normed]


@odd
@centred
@pytest.mark.parametrize("epsilon", [1, 12345, 1 << 45])
def test_factors_are_near_and_bounded(size: int, is_centred: bool, epsilon: int) -> None:
    """Within 2^-21, and 2^-29 of itself, of max |d| / root (see ``test_norms_are_nearest``)."""
    x = rows(size)
    found = torch_result("int_token_factors", {"x": x, "epsilon": epsilon, "is_centred": is_centred})
    assert (found.dtype, found.shape) == (torch.int32, (len(x), 1))
    for token, made in zip(deviations(x, is_centred).tolist(), found.flatten().tolist(), strict=True):
        # C Q - T^2 of the kernel is the sum of the squared deviations over C.
        power = Fraction(sum(each * each for each in token), size) + epsilon
        largest = max(map(abs, token))
        # 40 more bits than the factor has make the exact root an integer for all that is compared.
        wanted = Fraction(largest << (40 + FRACTION), isqrt(ceil(power * (1 << 80))))
        assert abs(made - wanted) <= Fraction(1, 2) + Fraction(made + 1, 1 << 29)
        assert made <= (isqrt(size) + 1) << FRACTION


@limits
@odd
@centred
def test_map_of_tokens_is_that_of_the_norm(ends: Arguments, size: int, is_centred: bool) -> None:
    """``W norm(x) + b`` from codes and factors, in codes of the result: half a code, half of both roundings in front.

    What the codes of tokens are off by is not part of it: the product is compared with that of the same codes.
    """
    x, epsilon, outputs = rows(size), size * size, 5
    codes = torch_result("int_token_codes", {"x": x, "is_centred": is_centred})
    factors = torch_result("int_token_factors", {"x": x, "epsilon": epsilon, "is_centred": is_centred})
    weight = any_codes(outputs, size, seed=3)
    spread = size * 127 * 128 * max(int(factors.max()), 1)
    token_shift = max(ceil(log2(spread)) - 29, 1)
    bias = any_numbers(outputs, limit=1 << 20)
    multiplier = torch.randint(1, 1 << 31, (outputs,), generator=seeded(5)).to(torch.int32)
    shift = 52
    found = torch_result(
        "int_linear_tokens",
        {"x": codes, "factors": factors, "weight": weight, "bias": bias, "multiplier": multiplier}
        | {"token_shift": token_shift, "shift": shift}
        | ends,
    )
    sums = (codes.to(torch.int64) @ weight.to(torch.int64).T) * factors.to(torch.int64)
    for row, made in zip(sums.tolist(), found.tolist(), strict=True):
        for total, b, m, code in zip(row, bias.tolist(), multiplier.tolist(), made, strict=True):
            exact = (Fraction(total, 1 << token_shift) + b) * Fraction(m, 1 << shift) + ends["zero_point"]
            wanted = min(max(exact, Fraction(ends["minimum"])), Fraction(ends["maximum"]))
            assert abs(code - wanted) <= Fraction(1, 2) + Fraction(m, 1 << (shift + 1))
