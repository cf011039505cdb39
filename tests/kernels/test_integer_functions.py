"""Every integer operator: what torch computes is what its ONNX function computes in stock onnxruntime, bit for bit."""

from __future__ import annotations

from typing import Final

import hypothesis.strategies as st
import pytest
import torch
from drawn_calls import CALLS
from hypothesis import given, settings
from integer_calls import MASK, SEEDS, WIDE, Arguments, any_codes, odd
from onnx_calls import assert_identical, call_function, onnx_result, torch_result
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from normfuse.kernels.integer_ops import INTEGER_OPERATORS
from normfuse.kernels.reference import rescaling, square_root
from normfuse.kernels.reference.norms import over_root
from normfuse.testing import seeded

INT8_ENDS: Final = {"zero_point": -5, "minimum": -128, "maximum": 127}
INT16_ENDS: Final = {"zero_point": 300, "minimum": -32768, "maximum": 32767}
RELU_ENDS: Final = {"zero_point": -101, "minimum": -101, "maximum": 127}

operators = pytest.mark.parametrize("name", sorted(CALLS))
limits = pytest.mark.parametrize("ends", [INT8_ENDS, INT16_ENDS, RELU_ENDS], ids=["int8", "int16", "relu"])


def check(name: str, arguments: Arguments, *, stored_from: int | None = None) -> Tensor:
    """Compare both and return what they agree on."""
    expected = torch_result(name, arguments)
    assert_identical(onnx_result(name, arguments, stored_from=stored_from), expected)
    if "maximum" in arguments:
        ends = arguments.get("minimum", 0), arguments["maximum"]
        assert expected.dtype == rescaling.codes_type(*ends)
    return expected


def any_numbers(*shape: int, low: int = -1000, high: int = 1000, seed: int = 1) -> Tensor:
    return torch.randint(low, high + 1, shape, generator=seeded(seed), dtype=torch.int32)


def test_every_operator_is_called() -> None:
    assert set(CALLS) == set(INTEGER_OPERATORS)


@operators
@given(data=st.data())
@settings(max_examples=60)
def test_function_equals_reference(name: str, data: st.DataObject) -> None:
    check(name, data.draw(CALLS[name]))


@operators
@given(data=st.data(), stored_from=st.sampled_from([0, 1, 2]))
@settings(max_examples=15)
def test_constants_may_stand_in_the_file(name: str, data: st.DataObject, stored_from: int) -> None:
    check(name, data.draw(CALLS[name]), stored_from=stored_from)


@operators
@given(data=st.data())
@settings(max_examples=10)
def test_traced_shape_and_type_are_those_computed(name: str, data: st.DataObject) -> None:
    arguments = data.draw(CALLS[name])
    with FakeTensorMode() as mode:
        faked = {key: mode.from_tensor(v) if isinstance(v, Tensor) else v for key, v in arguments.items()}
        traced = torch_result(name, faked)
    computed = torch_result(name, arguments)
    assert (traced.shape, traced.dtype) == (computed.shape, computed.dtype)


@limits
@pytest.mark.parametrize("dtype", [torch.int8, torch.int16], ids=str)
@pytest.mark.parametrize("multiplier", [3, -5, 2**31 - 1, -(2**31)])
def test_every_code_is_requantized(ends: Arguments, dtype: torch.dtype, multiplier: int) -> None:
    bounds = torch.iinfo(dtype)
    x = torch.arange(bounds.min, bounds.max + 1).to(dtype).reshape(-1, 2)
    bias = torch.tensor([-(2**30), 7], dtype=torch.int32)
    ratio = torch.tensor([multiplier], dtype=torch.int32)
    for shift in (1, multiplier.bit_length() + 1, 62):
        check("requantize", {"x": x, "bias": bias, "multiplier": ratio, "shift": shift} | ends)


@limits
@pytest.mark.parametrize(("first", "second"), [(3, -5), (2**46 - 1, 1 - 2**46), (12345, 54321)])
def test_every_pair_of_codes_is_added(ends: Arguments, first: int, second: int) -> None:
    every = torch.arange(-128, 128).to(torch.int8)
    pair = {"x": every[:, None], "y": every, "x_multiplier": first, "y_multiplier": second}
    for shift in (1, 16, 47, 62):
        check("int_add", pair | {"offset": -(1 << shift) // 3, "shift": shift} | ends)


@limits
@pytest.mark.parametrize("multiplier", [3, -5, 2**45])
@pytest.mark.parametrize("zeros", [(0, 0), (-128, 127)], ids=str)
def test_every_pair_of_codes_is_multiplied(ends: Arguments, zeros: tuple[int, int], multiplier: int) -> None:
    every = torch.arange(-128, 128).to(torch.int8)
    pair = {"x": every[:, None], "y": every, "x_zero_point": zeros[0], "y_zero_point": zeros[1]}
    for shift in (1, 9, 53, 62):
        check("int_multiply", pair | {"multiplier": multiplier, "shift": shift} | ends)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16], ids=str)
@pytest.mark.parametrize("shape", [(256,), (16, 16), (2, 8, 16), (2, 2, 8, 8)], ids=str)
def test_every_code_is_looked_up(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    table = any_codes(256, seed=4, dtype=dtype)
    x = torch.arange(-128, 128).to(torch.int8)
    found = check("int_table", {"x": x.reshape(shape), "table": table})
    assert torch.equal(found.flatten(), table)


@limits
@odd
@pytest.mark.parametrize("role", ["rows", "inner", "outer"])
def test_linear_of_odd_sizes(ends: Arguments, size: int, role: str) -> None:
    sizes = {"rows": 3, "inner": 5, "outer": 2} | {role: size}
    x, weight = any_codes(sizes["rows"], sizes["inner"]), any_codes(sizes["outer"], sizes["inner"], seed=2)
    bias = any_numbers(sizes["outer"])
    multiplier = any_numbers(sizes["outer"], low=-(2**31) + 1, high=2**31 - 1)
    maps = {"x": x, "weight": weight, "bias": bias, "multiplier": multiplier, "shift": 38}
    check("int_linear", maps | ends)
    check("int_linear", maps | ends, stored_from=1)
    side = any_codes(sizes["rows"], sizes["outer"], seed=3, dtype=torch.int16)
    check("int_linear_add", maps | {"residual": side, "residual_multiplier": -(2**37)} | ends)
    check(
        "int_linear_table", maps | {"table": any_codes(256, dtype=torch.int16), "zero_point": ends["zero_point"] % 100}
    )
    factors = {"x": x, "y": weight.mT.contiguous(), "multiplier": 2**31 - 1, "shift": 38}
    check("int_matmul", factors | ends)


@pytest.mark.parametrize("stored_from", [None, 1], ids=["given", "stored"])
@pytest.mark.parametrize(("x", "weight"), [(-128, -128), (-128, 127), (127, -128), (127, 127)])
def test_sums_reach_the_end_of_int32(x: int, weight: int, stored_from: int | None) -> None:
    inner = 2**17 - 1  # 128 * 128 * (2^17 - 1) is 2^31 - 2^14; sums of unsigned products are beyond 2^32 here
    ones = torch.ones(1, inner, dtype=torch.int8)
    vectors = {"bias": torch.zeros(1, dtype=torch.int32), "multiplier": torch.ones(1, dtype=torch.int32)}
    found = check(
        "int_linear",
        {"x": ones * x, "weight": ones * weight} | vectors | {"shift": 17} | INT16_ENDS | {"zero_point": 0},
        stored_from=stored_from,
    )
    assert int(found) == (x * weight * inner * 2 + 2**17) // 2**18


@odd
@pytest.mark.parametrize("groups", ["one", "depthwise"])
def test_convolution_of_odd_sizes(size: int, groups: str) -> None:
    is_depthwise = groups == "depthwise"
    x = any_codes(2, size, 4, 3)
    weight = any_codes(size if is_depthwise else 2, 1 if is_depthwise else size, 3, 2, seed=2)
    vectors = {
        "bias": any_numbers(len(weight)),
        "multiplier": any_numbers(len(weight), low=-(2**31) + 1, high=2**31 - 1),
    }
    options = {"stride": [2, 1], "padding": [1, 2], "dilation": [1, 2], "groups": size if is_depthwise else 1}
    call = {"x": x, "weight": weight, **vectors, **options, "x_zero_point": -77, "shift": 38} | INT8_ENDS
    found = check("int_conv2d", call)
    check("int_conv2d", call, stored_from=1)
    side = any_codes(*found.shape, seed=3)
    check("int_conv2d_add", call | {"residual": side, "residual_multiplier": 2**37})


@pytest.mark.parametrize("zero", [-128, -1, 0, 127])
def test_padding_of_a_convolution_is_zero(zero: int) -> None:
    x = torch.full((1, 1, 1, 1), zero, dtype=torch.int8)
    ones = torch.ones(1, dtype=torch.int32)
    options = {"stride": [1, 1], "padding": [3, 2], "dilation": [1, 1], "groups": 1, "x_zero_point": zero}
    call = {"x": x, "weight": any_codes(1, 1, 3, 3), "bias": 2 * ones, "multiplier": 4 * ones, "shift": 3} | options
    assert check("int_conv2d", call | INT8_ENDS).unique().tolist() == [1 + INT8_ENDS["zero_point"]]


ATTENTION: Final = {"score_multiplier": 1 << 20, "score_shift": 21, "multiplier": 3 << 28, "shift": 49}


@odd
@limits
@pytest.mark.parametrize("role", ["queries", "channels", "keys", "values"])
def test_attention_of_odd_sizes(ends: Arguments, size: int, role: str) -> None:
    sizes = {"queries": 3, "channels": 5, "keys": 4, "values": 2} | {role: size}
    q, k = any_codes(2, sizes["queries"], sizes["channels"]), any_codes(2, sizes["channels"], sizes["keys"], seed=2)
    call = {"q": q, "k": k, "v": any_codes(2, sizes["keys"], sizes["values"], seed=3)} | ATTENTION | ends
    check("int_attention", call | {"bias": None})
    bias = any_numbers(sizes["queries"], sizes["keys"])
    check("int_attention", call | {"bias": bias})
    masked = torch.where(any_numbers(sizes["queries"], sizes["keys"], seed=8) < 0, MASK, bias)
    masked[0] = MASK
    check("int_attention", call | {"bias": masked})


@pytest.mark.parametrize("keys", [1, 7])
@pytest.mark.parametrize("bias", [None, 0, MASK, -MASK])
@pytest.mark.parametrize("code", [-128, 127])
def test_attention_of_equal_scores(keys: int, bias: int | None, code: int) -> None:
    q, k = torch.full((2, 3), code).to(torch.int8), torch.full((3, keys), code).to(torch.int8)
    added = None if bias is None else torch.full((2, keys), bias, dtype=torch.int32)
    call = {"q": q, "k": k, "v": torch.full((keys, 4), code).to(torch.int8), "bias": added}
    found = check("int_attention", call | ATTENTION | {"multiplier": 1 << 29} | INT8_ENDS | {"zero_point": 0})
    assert found.unique().tolist() == [code]


FAR: Final = sorted({sign * ((1 << bit) + step) for sign in (-1, 1) for bit in range(62) for step in (-1, 0, 1)})
"""Where 64-bit comparisons that look at one half only go wrong: every power of two, and beside it."""


@limits
def test_whatever_is_beyond_the_codes_is_saturated(ends: Arguments) -> None:
    to = 3 if ends["maximum"] == 127 else 5
    found = call_function("saturate", [torch.tensor(FAR)], ends | {"to": to})
    expected = [min(max(each + ends["zero_point"], ends["minimum"]), ends["maximum"]) for each in FAR]
    assert found.tolist() == expected


@pytest.mark.parametrize("size", [1, 3, 9])
@pytest.mark.parametrize("multiplier", [1, -3, 2**31 - 1])
def test_biases_of_any_size_are_rescaled(size: int, multiplier: int) -> None:
    bias = torch.tensor([each for each in FAR if -(2**31) <= each < 2**31], dtype=torch.int32)
    ones = torch.ones(1, size, len(bias), dtype=torch.int8)
    ratio = torch.tensor(multiplier, dtype=torch.int32)
    for shift in (1, 8, 24, 31):
        check("requantize", {"x": ones, "bias": bias, "multiplier": ratio, "shift": shift} | INT16_ENDS)


@pytest.mark.parametrize("score_shift", [1, 8, 12, 20])
@pytest.mark.parametrize("score_multiplier", [1, 2**20 + 1, 2**29])
@pytest.mark.parametrize("bias", [-(2**29), MASK, -MASK])
def test_scores_of_any_distance(bias: int, score_multiplier: int, score_shift: int) -> None:
    q, k, v = any_codes(5, 3), any_codes(3, 17, seed=2), any_codes(17, 4, seed=3)
    added = torch.where(any_numbers(5, 17) < 0, bias, any_numbers(5, 17, seed=9)).to(torch.int32)
    call = {"q": q, "k": k, "v": v, "bias": added, "score_multiplier": score_multiplier, "score_shift": score_shift}
    check("int_attention", call | {"multiplier": 3 << 28, "shift": 49} | INT8_ENDS)


@pytest.mark.parametrize("ratio", [(1, 31), (1, 24), (2**29, 40), (2**29, 1)], ids=str)
def test_scores_reach_the_end_of_int32(ratio: tuple[int, int]) -> None:
    channels = 2**16 - 1  # 128 * 128 of them are 2^30 - 2^14, and a bias of 2^30 comes on top
    q = torch.tensor([[-128], [127], [0]], dtype=torch.int8).expand(3, channels).contiguous()
    k = torch.tensor([[-128, -128, 127, 127, 1, 0, -1]], dtype=torch.int8).expand(channels, 7).contiguous()
    bias = torch.tensor([[-MASK, MASK, -MASK, MASK, 0, 5, MASK]], dtype=torch.int32)
    call = {"q": q, "k": k, "v": any_codes(7, 5), "score_multiplier": ratio[0], "score_shift": ratio[1]}
    for each in (bias, bias.flip(-1), None):
        check("int_attention", call | {"bias": each, "multiplier": 3 << 28, "shift": 49} | INT8_ENDS)


@pytest.mark.parametrize("x0", [-5, -127, -128, -200, -300, -2000])
def test_published_sums_are_cut(x0: int) -> None:
    x = any_codes(5, 33)
    check("shift_gelu", {"x": x, "x0": x0, "n": 23, "multiplier": 3, "shift": 4} | INT16_ENDS)
    check("shiftmax", {"scores": x, "x0": x0, "n": 22, "maximum": 32767})


def extreme_rows(size: int, dtype: torch.dtype) -> Tensor:
    """Return rows of any codes, of one code, of an outlier and of alternating corners."""
    low, high = torch.iinfo(dtype).min, torch.iinfo(dtype).max
    x = any_codes(7, size, dtype=dtype)
    x[1], x[2], x[3] = low, high, 0
    x[4], x[4, 0] = low, high
    x[5, ::2], x[5, 1::2] = low, high
    return x


@odd
@limits
@pytest.mark.parametrize("name", ["int_layer_norm", "int_rms_norm"])
@pytest.mark.parametrize("dtype", [torch.int8, torch.int16], ids=str)
def test_norm_of_odd_sizes(ends: Arguments, size: int, name: str, dtype: torch.dtype) -> None:
    x = extreme_rows(size, dtype)
    vectors = {"bias": any_numbers(size, low=-(2**22), high=2**22)}
    vectors["multiplier"] = any_numbers(size, low=-(2**31) + 1, high=2**31 - 1, seed=2)
    for epsilon in (1, size * size, 2**40):
        check(name, {"x": x, **vectors, "epsilon": epsilon, "shift": 46} | ends)


@odd
@limits
@pytest.mark.parametrize("is_centred", [True, False])
@pytest.mark.parametrize("dtype", [torch.int8, torch.int16], ids=str)
def test_tokens_of_odd_sizes(ends: Arguments, size: int, is_centred: bool, dtype: torch.dtype) -> None:
    x, weight = extreme_rows(size, dtype), any_codes(3, size, seed=3)
    codes = check("int_token_codes", {"x": x, "is_centred": is_centred})
    vectors = {"bias": any_numbers(3, low=-(2**30), high=2**30)}
    vectors["multiplier"] = any_numbers(3, low=-(2**31) + 1, high=2**31 - 1, seed=2)
    table = {"table": any_codes(256, dtype=torch.int16), "zero_point": ends["zero_point"] % 100}
    for epsilon in (1, size * size, 2**40):
        factors = check("int_token_factors", {"x": x, "epsilon": epsilon, "is_centred": is_centred})
        maps = {"x": codes, "factors": factors, "weight": weight, **vectors, "token_shift": 25, "shift": 50}
        check("int_linear_tokens", maps | ends)
        check("int_linear_tokens", maps | ends, stored_from=2)
        check("int_linear_tokens_table", maps | table)


@limits
@odd
@pytest.mark.parametrize("axes", [[0], [-1], [0, 2], [1, -1], [0, 1, 2]], ids=str)
def test_mean_of_odd_sizes(ends: Arguments, size: int, axes: list[int]) -> None:
    x = any_codes(3, size, 2, dtype=torch.int16)
    for keeps_axes in (False, True):
        mean = {"x": x, "axes": axes, "keeps_axes": keeps_axes, "offset": -size, "multiplier": -(2**30), "shift": 31}
        check("int_mean", mean | ends)


@pytest.mark.parametrize("shift", range(1, 63))
def test_rounded_shift_function(shift: int) -> None:
    half = 1 << (shift - 1)
    near = [sign * (odd_half * half + step) for sign in (-1, 1) for odd_half in (0, 1, 3) for step in (-1, 0, 1)]
    x = torch.tensor([each for each in (*near, WIDE - 1, 1 - WIDE) if abs(each) < WIDE])
    found = call_function("rounded_shift", [x], {"shift": shift})
    assert_identical(found, rescaling.rounded_shift(x, shift))
    assert found.tolist() == [(2 * each + (1 << shift)) >> (shift + 1) for each in x.tolist()]


@given(seed=SEEDS)
@settings(max_examples=20)
def test_over_root_function(seed: int) -> None:
    generator = seeded(seed)
    roots = torch.randint(1, 1 << 31, (500,), generator=generator) >> torch.randint(0, 31, (500,), generator=generator)
    roots = torch.cat([roots, torch.tensor([1, 2, 1 << 30, (1 << 31) - 1])])
    squares = roots * roots
    power = torch.cat([squares - 1, squares, squares + 1, squares + 2 * roots, torch.tensor([WIDE - 1])])
    check_over_root(power.clamp(1, WIDE - 1))


@pytest.mark.parametrize("doublings", range(1, 16))
def test_over_root_where_newton_ends_above(doublings: int) -> None:
    """One below a square, Newton's steps end at the root or above it in turns: at 4^doublings power = m^2 - 1 here."""
    step = 1 << (2 * doublings - 1)
    multiples = (
        torch.randint((1 << 30) // step, (1 << 31) // step, (200,), generator=seeded(doublings)).clamp(min=1) * step
    )
    m = torch.cat([multiples + 1, multiples - 1])
    m = m[(m >= 1 << 30) & (m < 1 << 31)]
    assert len(m)
    check_over_root((m * m - 1) >> (2 * doublings))


def check_over_root(power: Tensor) -> None:
    largest, power = torch.full((len(power), 1), (1 << 31) - 1), power[:, None]  # times a reciprocal it is below 2^62
    root = square_root(power)
    x = torch.cat([-largest, -root, torch.zeros_like(root), root // 3, root, largest // 7, largest], dim=-1)
    found = call_function("over_root", [x, power], {})
    assert_identical(found, over_root(x, power))
