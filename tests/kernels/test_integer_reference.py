"""What the integer operators compute is what exact arithmetic says, or as near to the float function as is derived."""

from __future__ import annotations

from collections.abc import Callable
from decimal import Decimal, getcontext
from fractions import Fraction
from math import floor, isqrt, sqrt
from typing import Any, Final

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from onnx_calls import torch_result
from torch import Tensor
from torch.nn import functional

from normfuse.kernels.reference import rescale, square_root
from normfuse.kernels.reference.attention import EXPONENTIALS
from normfuse.testing import seeded

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

SEEDS = st.integers(0, 2**32 - 1)
INT32 = st.integers(-(2**31), 2**31 - 1)
limits = pytest.mark.parametrize("ends", ENDS.values(), ids=ENDS.keys())
odd = pytest.mark.parametrize("size", ODD)


def half_up(value: Fraction) -> int:
    return floor(value + Fraction(1, 2))


def code(value: Fraction, ends: Arguments) -> int:
    """Return the code of a number in units of codes: rounded once, moved by the zero point, saturated."""
    return min(max(half_up(value) + ends["zero_point"], ends["minimum"]), ends["maximum"])


def exact_codes(numerators: Tensor, shift: int, ends: Arguments) -> list[int]:
    return [code(Fraction(each, 1 << shift), ends) for each in numerators.flatten().tolist()]


def codes_of(ends: Arguments) -> torch.dtype:
    return torch.int8 if ends["minimum"] >= -128 and ends["maximum"] < 128 else torch.int16


def any_codes(*shape: int, seed: int = 0, dtype: torch.dtype = torch.int8) -> Tensor:
    bounds = torch.iinfo(dtype)
    return torch.randint(bounds.min, bounds.max + 1, shape, generator=seeded(seed), dtype=dtype)


def any_numbers(*shape: int, limit: int = 1000, seed: int = 1) -> Tensor:
    return torch.randint(-limit, limit + 1, shape, generator=seeded(seed), dtype=torch.int32)


# Rescaling, against fractions.


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


# The root, against isqrt.


def assert_roots(numbers: list[int]) -> None:
    assert square_root(torch.tensor(numbers)).tolist() == [isqrt(each) for each in numbers]


def test_root_of_small_numbers() -> None:
    assert_roots(list(range(70_000)))


def test_root_at_corners() -> None:
    roots = {(1 << bit) + step for bit in range(31) for step in (-1, 0, 1)} | {
        (1 << 31) - 1,
        (1 << 31) - 2,
        94906265,
        94906266,
    }
    squares = {root * root + step for root in roots for step in (-1, 0, 1)} | {WIDE - 1, WIDE - 2, 0, 1, 2, 3}
    assert_roots(sorted(each for each in squares if 0 <= each < WIDE))


@given(st.lists(st.integers(0, 2**31 - 1), min_size=200, max_size=200))
@settings(max_examples=25)
def test_root_around_squares(roots: list[int]) -> None:
    assert_roots([max(root * root + step, 0) for root in roots for step in (-1, 0, 1, 2 * root)])


@given(st.lists(st.integers(0, WIDE - 1), min_size=200, max_size=200))
@settings(max_examples=25)
def test_root_of_anything(numbers: list[int]) -> None:
    assert_roots(numbers)


# Norms, against float64.

LARGEST_GAIN: Final = 1 << 13
"""A scale per channel over the result's scale; 8-bit results have about 127 / 4."""


def norm_rows(channels: int, dtype: torch.dtype) -> Tensor:
    """Return rows of every kind: random of many spreads and means, constant, an outlier, alternating corners."""
    low, high = torch.iinfo(dtype).min, torch.iinfo(dtype).max
    generator = seeded(channels)
    spreads = torch.tensor([0.4, 1.0, 10.0, high / 4, high], dtype=torch.float64)[:, None]
    means = torch.tensor([0.0, -3.0, high / 2, low], dtype=torch.float64)[:, None, None]
    drawn = torch.randn(4, 5, channels, generator=generator, dtype=torch.float64) * spreads + means
    rows = [*drawn.flatten(0, 1).round().clamp(low, high)]
    rows += [torch.full((channels,), float(each)) for each in (low, -1, 0, 1, high)]
    for rest, outlier in ((0, high), (0, 1), (low, high), (high, low), (high, high - 1)):
        rows.append(torch.full((channels,), float(rest)))
        rows[-1][channels // 2] = outlier
    rows.append(torch.full((channels,), float(low)))
    rows[-1][::2] = high
    return torch.stack([row.double() for row in rows]).to(dtype)


def float_norm(name: str, x: Tensor, epsilon: float) -> Tensor:
    """Return the norm in float64, of C x for x, whose deviations from their mean are integers: nothing cancels."""
    deviations = x.double() * x.shape[-1]
    if name == "int_layer_norm":
        deviations = deviations - x.double().sum(-1, keepdim=True)
    return deviations / (deviations.square().mean(-1, keepdim=True) + epsilon).sqrt()


@odd
@pytest.mark.parametrize("name", ["int_layer_norm", "int_rms_norm"])
def test_float_norm_is_torchs(size: int, name: str) -> None:
    x, scale, eps = any_codes(5, size), 0.0173, 1e-3
    norm = functional.layer_norm if name == "int_layer_norm" else functional.rms_norm
    torch.testing.assert_close(
        float_norm(name, x, eps * (size / scale) ** 2), norm(x.double() * scale, (size,), eps=eps), atol=1e-12, rtol=0
    )


@limits
@odd
@pytest.mark.parametrize("dtype", [torch.int8, torch.int16], ids=str)
@pytest.mark.parametrize("name", ["int_layer_norm", "int_rms_norm"])
@pytest.mark.parametrize(("gain", "shift"), [(3.7, 46), (31.75, 44), (float(LARGEST_GAIN), 30)])
def test_norms_are_nearest(ends: Arguments, size: int, dtype: torch.dtype, name: str, gain: float, shift: int) -> None:
    """The code is within half a code and ``gain (2^-21 + |n| 2^-29)`` of the norm, below 0.51 codes for gains to 2^13.

    n has 20 bits behind the point, so its rounding is 2^-21. A root of 31 bits rounded down makes 1 / root up to
    2^-30 too large, and its reciprocal of 31 bits is rounded by 2^-31 of itself: 2^-29 of n covers both. No |n| is
    above sqrt(C), so the second is below 2^-23 here.
    """
    x = norm_rows(size, dtype)
    generator = seeded(7)
    signs = torch.randint(2, (size,), generator=generator) * 2 - 1
    gains = signs * gain * (torch.rand(size, generator=generator, dtype=torch.float64) * 0.8 + 0.2)
    multiplier = torch.round(gains * 2.0 ** (shift - 20)).to(torch.int32)
    bias = any_numbers(size, limit=2**21)
    exact_gain, n_bias = multiplier.double() / 2.0 ** (shift - 20), bias.double() / 2**20
    for epsilon in (1, max(size * size // 100, 1), 3 * size * size, 2**45):
        call = {"x": x, "bias": bias, "multiplier": multiplier, "epsilon": epsilon, "shift": shift}
        found = torch_result(name, call | ends)
        assert found.dtype == codes_of(ends)
        normal = float_norm(name, x, epsilon)
        wanted = ((normal + n_bias) * exact_gain + ends["zero_point"]).clamp(ends["minimum"], ends["maximum"])
        off = (found.double() - wanted).abs()
        assert float(off.max()) <= 0.51
        assert bool((off <= 0.5 + exact_gain.abs() * (2.0**-21 + normal.abs() * 2.0**-29)).all())


@pytest.mark.parametrize("name", ["int_layer_norm", "int_rms_norm"])
@given(power=st.integers(1, WIDE - 1), wide=st.integers(-32768, 32767))
def test_norm_of_one_channel(name: str, power: int, wide: int) -> None:
    """A layer norm of one channel is its bias; an RMS norm is x / sqrt(x^2 + epsilon)."""
    epsilon = max(power - wide * wide, 1)
    x, one = torch.tensor([[wide]], dtype=torch.int16), torch.tensor([1 << 20], dtype=torch.int32)
    call = {"x": x, "bias": one, "multiplier": one, "epsilon": epsilon, "shift": 27}
    found = int(torch_result(name, call | {"zero_point": 0, "minimum": -32768, "maximum": 32767}))
    root = 0.0 if name == "int_layer_norm" else wide / sqrt(wide * wide + epsilon)
    assert abs(found - (root + 1) * 2**13) <= 0.5 + 2**13 * (2.0**-21 + 2.0**-29)


# Products, against float64.


@limits
@odd
@pytest.mark.parametrize("role", ["rows", "inner", "outer"])
def test_linear_maps_are_exact(ends: Arguments, size: int, role: str) -> None:
    """Multipliers of 22 bits keep every product below 2^52, so float64 is exact up to its one rounding."""
    sizes = {"rows": 3, "inner": 5, "outer": 2} | {role: size}
    x, weight = any_codes(sizes["rows"], sizes["inner"]), any_codes(sizes["outer"], sizes["inner"], seed=2)
    bias, multiplier = any_numbers(sizes["outer"], limit=2**20), any_numbers(sizes["outer"], limit=2**22, seed=2)
    call = {"x": x, "weight": weight, "bias": bias, "multiplier": multiplier, "shift": 30}
    sums = torch.einsum("ri,oi->ro", x.double(), weight.double()) + bias
    value = sums * multiplier / 2**30
    found = torch_result("int_linear", call | ends)
    assert torch.equal(found, nearest(value, ends))
    side = any_codes(sizes["rows"], sizes["outer"], seed=3, dtype=torch.int16)
    with_side = torch_result("int_linear_add", call | {"residual": side, "residual_multiplier": -(2**29) - 3} | ends)
    assert torch.equal(with_side, nearest(value + side.double() * (-(2**29) - 3) / 2**30, ends))
    table = any_codes(256, seed=4, dtype=torch.int16)
    looked_up = torch_result("int_linear_table", call | {"table": table, "zero_point": -5})
    assert torch.equal(looked_up, table[nearest(value, ENDS["int8"]).long() + 128])
    factors = {"x": x, "y": weight.mT, "multiplier": -(2**22), "shift": 30}
    assert torch.equal(torch_result("int_matmul", factors | ends), nearest((sums - bias) * -(2**22) / 2**30, ends))


def nearest(value: Tensor, ends: Arguments) -> Tensor:
    found = torch.floor(value + 0.5) + ends["zero_point"]
    return found.clamp(ends["minimum"], ends["maximum"]).to(codes_of(ends))


def test_sums_reach_the_end_of_int32() -> None:
    ones = torch.ones(1, 2**17 - 1, dtype=torch.int8)
    vectors = {"bias": torch.tensor([2**14 - 1], dtype=torch.int32), "multiplier": torch.ones(1, dtype=torch.int32)}
    call = {"x": -128 * ones, "weight": -128 * ones, **vectors, "shift": 17} | ENDS["int16"]
    assert int(torch_result("int_linear", call)) == 2**14 + 300  # (2^31 - 1) / 2^17 is just below


WINDOWS: Final = {
    "plain": {"stride": [1, 1], "padding": [0, 0], "dilation": [1, 1], "groups": 1},
    "strided": {"stride": [2, 3], "padding": [1, 2], "dilation": [1, 1], "groups": 1},
    "dilated": {"stride": [1, 2], "padding": [3, 2], "dilation": [3, 2], "groups": 2},
    "depthwise": {"stride": [1, 1], "padding": [1, 1], "dilation": [1, 1], "groups": 4},
}


def float_convolution(x: Tensor, weight: Tensor, options: Arguments) -> Tensor:
    """Return the convolution tap by tap: one product per place of the kernel."""
    (s0, s1), (p0, p1), (d0, d1) = options["stride"], options["padding"], options["dilation"]
    padded, groups = functional.pad(x, (p1, p1, p0, p0)), options["groups"]
    (out, per_group, k0, k1), total = weight.shape, torch.zeros(())
    rows, columns = (
        (size - d * (k - 1) - 1) // s + 1
        for size, d, k, s in zip(padded.shape[2:], (d0, d1), (k0, k1), (s0, s1), strict=True)
    )
    grouped = padded.unflatten(1, (groups, per_group))
    kernels = weight.unflatten(0, (groups, out // groups))
    for i in range(k0):
        for j in range(k1):
            seen = grouped[
                ..., i * d0 : i * d0 + (rows - 1) * s0 + 1 : s0, j * d1 : j * d1 + (columns - 1) * s1 + 1 : s1
            ]
            total = total + torch.einsum("bgchw,goc->bgohw", seen, kernels[..., i, j])
    return total.flatten(1, 2)


@limits
@pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS.keys())
@pytest.mark.parametrize("zero", [-128, 0, 77])
def test_convolutions_are_exact(ends: Arguments, window: Arguments, zero: int) -> None:
    """As for linear maps, float64 is exact; what is padded counts nothing."""
    x, weight = any_codes(2, 4, 9, 7), any_codes(8, 4 // window["groups"], 3, 2, seed=2)
    bias, multiplier = any_numbers(8, limit=2**20), any_numbers(8, limit=2**22, seed=2)
    call = {
        "x": x,
        "weight": weight,
        "bias": bias,
        "multiplier": multiplier,
        "x_zero_point": zero,
        "shift": 30,
        **window,
    }
    sums = float_convolution(x.double() - zero, weight.double(), window)
    value = (sums + bias[:, None, None]) * multiplier[:, None, None] / 2**30
    assert torch.equal(torch_result("int_conv2d", call | ends), nearest(value, ends))
    side = any_codes(*value.shape, seed=3)
    with_side = torch_result("int_conv2d_add", call | {"residual": side, "residual_multiplier": 2**31 + 5} | ends)
    assert torch.equal(with_side, nearest(value + side.double() * (2**31 + 5) / 2**30, ends))


# Attention, against float64.


def test_exponentials_are_rounded_to_nearest() -> None:
    getcontext().prec = 50
    exact = [Decimal(255 * 256) * Decimal(2) ** (Decimal(-index) / 256) for index in range(256)]
    assert list(EXPONENTIALS) == [int(each.to_integral_value()) for each in exact]


@pytest.mark.parametrize("steps", [1, 2, 4, 16])
def test_weights_are_nearest(steps: int) -> None:
    """A weight is within 1/2 + 2^-9 of 255 2^-t, and its exponent rounded by 2^-9: the bound of ``attended``.

    Two keys, t apart, with v 0 and 127: the result at 2^-8 of a code is another for every weight, so it tells it.
    """
    distances = torch.arange(127 * 64)
    q = (distances[:, None] - 127 * torch.arange(64)).clamp(0, 127).to(torch.int8)
    k, v = torch.tensor([[0, -1]]).to(torch.int8).expand(64, 2).contiguous(), torch.tensor([[0], [127]]).to(torch.int8)
    scores = {"bias": None, "score_multiplier": 2**20 // steps, "score_shift": 20}
    call = {"q": q, "k": k, "v": v, **scores, "multiplier": 2**30, "shift": 42}
    found = torch_result("int_attention", call | ENDS["int16"] | {"zero_point": 0})
    weight_of = {half_up(Fraction(weight * 127 * 2**8, 255 + weight)): weight for weight in range(256)}
    assert len(weight_of) == 256
    weights = torch.tensor([weight_of[each] for each in found.flatten().tolist()])
    exact = 255 * torch.exp2(-distances.double() / (256 * steps))
    rounded = (distances % steps != 0) * (2.0 ** (1 / 512) - 1) * exact
    assert int(weights[0]) == 255
    assert bool(((weights - exact).abs() <= 0.5 + 2.0**-9 + rounded).all())


def attention_call(queries: int, keys: int, *, channels: int = 16, values: int = 5, octaves: float = 8.0) -> Arguments:
    """Return a call whose random scores span about ``octaves`` octaves, and whose result has v's scale."""
    q, k = any_codes(queries, channels, seed=queries), any_codes(channels, keys, seed=keys)
    spread = max(int((q.double() @ k.double()).abs().max()), 1)
    scores = {"score_multiplier": round(octaves * 256 / spread * 2**24), "score_shift": 25, "bias": None}
    return {"q": q, "k": k, "v": any_codes(keys, values, seed=3), **scores, "multiplier": 2**30, "shift": 50}


def attended(call: Arguments) -> tuple[Tensor, Tensor]:
    """Return softmax attention in float64, in units of v's codes, and how far 8-bit weights may be from it.

    Let w be a weight over the row's largest and W its code. Three things move W from 255 w:

    - its exponent is rounded to 2^-8 octaves, by 2^-9 at most: a factor of 2^(1/512), 0.0014 of it;
    - the entry of the table is rounded by 1/2 at 8 bits behind the point: 2^-9 at most;
    - W is rounded to an integer: 1/2 at most; and 31 octaves down and more both are 0 and below 2^-22.

    So |W - 255 w| <= d = 1/2 + 2^-9 + 255 w (2^(1/512) - 1). With o the true result, the sum of 255 w (v - o) is 0,
    hence the computed one is off by |sum of (W - 255 w) (v - o)| / sum of W <= sum of d |v - o| / sum of W. The sum of
    W is at least 255, as the largest is 255 exactly, and at least the sum of 255 w - d.
    """
    scores = call["q"].double() @ call["k"].double() + (0 if call["bias"] is None else call["bias"])
    octaves = (scores.amax(-1, keepdim=True) - scores) * call["score_multiplier"] / 2.0 ** (call["score_shift"] + 8)
    weights, v = torch.exp2(-octaves), call["v"].double()
    found = (weights / weights.sum(-1, keepdim=True)) @ v
    moved = 0.5 + 2.0**-9 + 255 * weights * (2.0 ** (1 / 512) - 1)
    total = (255 * weights - moved).sum(-1, keepdim=True).clamp(min=255.0)
    distances = (v[..., None, :, :] - found[..., :, None, :]).abs()
    return found, (moved[..., None] * distances).sum(-2) / total


def check_attention(call: Arguments, ends: Arguments) -> None:
    """Compare with float64: half a code beyond what 8-bit weights explain, and 2^-23 for the row's divisor.

    The multiplier over the sum is rounded down, which loses less than |sum of W v| / 2^shift <= 255 keys 2^7 / 2^50:
    for 1823 keys below 2^-24. Beside it float64 is exact.
    """
    found, (wanted, slack) = torch_result("int_attention", call | ends).double(), attended(call)
    wanted = (wanted + ends["zero_point"]).clamp(ends["minimum"], ends["maximum"])
    assert bool(((found - wanted).abs() <= 0.5 + slack + 2.0**-23).all())


@limits
@odd
@pytest.mark.parametrize("octaves", [0.01, 2.0, 8.0, 30.0, 300.0], ids=str)
@pytest.mark.parametrize("biased", [False, True], ids=["bare", "biased"])
def test_attention_is_as_near_as_its_weights(ends: Arguments, size: int, octaves: float, biased: bool) -> None:
    call = attention_call(6, size, octaves=octaves)
    if biased:
        bias = any_numbers(6, size, limit=2**14)
        call["bias"] = torch.where(any_numbers(6, size, seed=9) < -500, MASK, bias).to(torch.int32)
    check_attention(call, ends)


@given(seed=SEEDS, keys=st.sampled_from([1, 2, 7, 33, 129]), score_shift=st.integers(8, 40))
def test_attention_of_any_scores(seed: int, keys: int, score_shift: int) -> None:
    q, k, v = any_codes(2, 3, 5, seed=seed), any_codes(2, 5, keys, seed=seed + 1), any_codes(2, keys, 4, seed=seed + 2)
    scores = {"bias": None, "score_multiplier": 2**30 - 7, "score_shift": score_shift}
    call = {"q": q, "k": k, "v": v, **scores, "multiplier": 2**30, "shift": 50}
    check_attention(call, ENDS["int8"])


@odd
@pytest.mark.parametrize("value", [-128, -1, 0, 1, 127])
@pytest.mark.parametrize("octaves", [0.0, 3.0, 500.0], ids=str)
def test_weights_sum_to_one(size: int, value: int, octaves: float) -> None:
    """A constant v comes back unchanged, whatever the scores.

    Its sum is exactly v times the divisor; what the divisor loses is below 2^-24 (see above) and rounding takes it.
    """
    call = attention_call(5, size, octaves=octaves) | ENDS["int8"] | {"zero_point": 0}
    call["v"] = torch.full_like(call["v"], value)
    assert torch_result("int_attention", call).unique().tolist() == [value]


@limits
@given(
    seed=SEEDS, keys=st.sampled_from([1, 2, 7, 129]), multiplier=st.integers(0, 2**31 - 1), shift=st.integers(21, 62)
)
def test_a_constant_is_rescaled(ends: Arguments, seed: int, keys: int, multiplier: int, shift: int) -> None:
    """At another scale, a constant v is rescaled as ``rescale`` does, unless what the divisor loses crosses a half."""
    call: Arguments = {"q": any_codes(3, 5, seed=seed), "k": any_codes(5, keys, seed=seed + 1), "bias": None}
    call |= {"score_multiplier": 2**20, "score_shift": 24, "multiplier": multiplier, "shift": shift}
    value = seed % 256 - 128
    found = torch_result("int_attention", call | {"v": torch.full((keys, 2), value).to(torch.int8)} | ends)
    exact, lost = Fraction(value * multiplier, 1 << (shift - 20)), Fraction(255 * keys * value, 1 << shift)
    assert set(found.flatten().tolist()) <= between(exact, lost, ends)


def between(exact: Fraction, lost: Fraction, ends: Arguments) -> set[int]:
    """Return the codes from ``exact - lost`` to ``exact``: one, or two beside each other if a half is between."""
    low, high = sorted((code(exact - lost, ends), code(exact, ends)))
    return set(range(low, high + 1))


@pytest.mark.parametrize("keys", [2, 7, 129])
def test_masked_keys_are_as_if_absent(keys: int) -> None:
    call, kept = attention_call(5, keys) | ENDS["int16"], torch.arange(keys) % 3 != 1
    bias = any_numbers(5, keys)
    masked = torch_result("int_attention", call | {"bias": torch.where(kept, bias, MASK).to(torch.int32)})
    present = {"k": call["k"][:, kept], "v": call["v"][kept], "bias": bias[:, kept]}
    assert torch.equal(masked, torch_result("int_attention", call | present))


def test_a_row_masked_as_a_whole_is_as_if_not_masked() -> None:
    call, bias = attention_call(5, 33) | ENDS["int8"], any_numbers(5, 33)
    masked = torch_result("int_attention", call | {"bias": bias + MASK})
    assert torch.equal(masked, torch_result("int_attention", call | {"bias": bias}))


def test_order_of_keys_means_nothing() -> None:
    call, order = attention_call(5, 129) | ENDS["int16"], torch.randperm(129, generator=seeded(1))
    other = call | {"k": call["k"][:, order], "v": call["v"][order]}
    assert torch.equal(torch_result("int_attention", other), torch_result("int_attention", call))


# Batches.


def batched_calls(size: int) -> dict[str, tuple[Arguments, tuple[str, ...]]]:
    """Return a call of every operator on a batch, and which of its arguments have the batch in front."""
    row, image, tokens = any_codes(size, 5, 8), any_codes(size, 4, 6, 5), any_codes(size, 5, 8, dtype=torch.int16)
    vectors = {"bias": any_numbers(8), "multiplier": any_numbers(8, limit=2**24), "shift": 30}
    linear = {"x": row, "weight": any_codes(8, 8, seed=2), **vectors}
    window = {"x": image, "weight": any_codes(8, 2, 3, 2, seed=2), **vectors, **WINDOWS["dilated"], "x_zero_point": 3}
    side = {"residual": any_codes(size, 8, 6, 4, seed=3), "residual_multiplier": 2**28}
    one = {"multiplier": 2**20, "shift": 30}
    norm = {"x": tokens, **vectors, "epsilon": 64}
    heads = {
        "q": row,
        "k": any_codes(size, 8, 7, seed=4),
        "v": any_codes(size, 7, 3, seed=5),
        "bias": any_numbers(5, 7),
    }
    scores = {"score_multiplier": 2**20, "score_shift": 24, "multiplier": 2**30, "shift": 50}
    line = {"x": tokens, "low": torch.tensor([0, 0, 4]), "high": torch.tensor([0, 1, 3]), "axis": 1}
    line["weight"] = torch.tensor([[0], [2**13 + 1], [77]], dtype=torch.int32)
    pair = {"x": row, "y": any_codes(size, 5, 8, seed=6)}
    return {
        "requantize": ({"x": tokens, **vectors}, ("x",)),
        "int_add": (pair | {"x_multiplier": 2**28, "y_multiplier": -(2**29), "offset": 5, "shift": 30}, ("x", "y")),
        "int_multiply": (pair | {"x_zero_point": 3, "y_zero_point": -4, **one}, ("x", "y")),
        "int_mean": (
            {"x": tokens, "axes": [1], "keeps_axes": False, "offset": 3, "multiplier": 2**26, "shift": 30},
            ("x",),
        ),
        "int_table": ({"x": row, "table": any_codes(256)}, ("x",)),
        "int_linear": (linear, ("x",)),
        "int_linear_add": (linear | {"residual": tokens, "residual_multiplier": 2**22}, ("x", "residual")),
        "int_linear_table": (linear | {"table": any_codes(256)}, ("x",)),
        "int_conv2d": (window, ("x",)),
        "int_conv2d_add": (window | side, ("x", "residual")),
        "int_matmul": ({"x": row, "y": heads["k"], **one}, ("x", "y")),
        "int_attention": (heads | scores, ("q", "k", "v")),
        "int_layer_norm": (norm, ("x",)),
        "int_rms_norm": (norm, ("x",)),
        "shiftmax": ({"scores": row, "x0": -23, "n": 15}, ("scores",)),
        "shift_gelu": ({"x": row, "x0": -23, "n": 23, "multiplier": 2**26, "shift": 30}, ("x",)),
        "lambda_shift_gelu": ({"x": row, "x0": -1504, "bound": 99, **one}, ("x",)),
        "int_interpolate": (line, ("x",)),
    }


BATCHED: Final = sorted(batched_calls(1))


@pytest.mark.parametrize("name", BATCHED)
def test_batch_means_nothing(name: str) -> None:
    arguments, batched = batched_calls(5)[name]
    fewer = {"int_table": (), "int_interpolate": (), "int_linear_table": ("zero_point",), "shiftmax": ("maximum",)}
    ends = {key: value for key, value in ENDS["int16"].items() if key in fewer.get(name, ENDS["int16"])}

    def result(pick: Callable[[Tensor], Tensor]) -> Tensor:
        return torch_result(name, arguments | {key: pick(arguments[key]) for key in batched} | ends)

    together = result(lambda x: x)
    assert len(together.unique()) > 3
    for index in range(5):
        assert torch.equal(result(lambda x, index=index: x[index : index + 1]), together[index : index + 1])
    assert torch.equal(result(lambda x: x.flip(0)), together.flip(0))
    extreme = result(
        lambda x: torch.cat([torch.full_like(x[:1], torch.iinfo(x.dtype).min), x, torch.zeros_like(x[:2])])
    )
    assert torch.equal(extreme[1:-2], together)
