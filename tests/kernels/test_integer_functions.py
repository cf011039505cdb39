"""Every integer operator: what torch computes is what its ONNX function computes in stock onnxruntime, bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import ceil, floor, log2, prod, sqrt
from typing import Any, Final

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from onnx_calls import assert_identical, call_function, onnx_result, torch_result
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from normfuse.kernels.integer_ops import INTEGER_OPERATORS
from normfuse.kernels.reference import rescaling, square_root
from normfuse.kernels.reference.norms import _over_root
from normfuse.testing import seeded

Draw = Callable[[st.SearchStrategy[Any]], Any]
Arguments = dict[str, Any]

WIDE: Final = 1 << 62
"""What is shifted stays below this in magnitude: the contract of the operators."""

MASK: Final = -(1 << 30)
ODD: Final = (1, 7, 129, 1823)
INT8_ENDS: Final = {"zero_point": -5, "minimum": -128, "maximum": 127}
INT16_ENDS: Final = {"zero_point": 300, "minimum": -32768, "maximum": 32767}
RELU_ENDS: Final = {"zero_point": -101, "minimum": -101, "maximum": 127}

SEEDS = st.integers(0, 2**32 - 1)
SIZES = st.sampled_from([1, 2, 3, 5, 7, 16, 33])
CODES = st.sampled_from([torch.int8, torch.int16])


def numbers(draw: Draw, shape: Sequence[int], low: int, high: int, dtype: torch.dtype) -> Tensor:
    """Draw integers: random ones, corners, or the same corner everywhere."""
    generator = seeded(draw(SEEDS))
    corners = torch.tensor(sorted(each for each in {low, low + 1, -1, 0, 1, high - 1, high} if low <= each <= high))
    match draw(st.sampled_from(["any", "any", "corners", "one corner"])):
        case "any":
            found = torch.randint(low, high + 1, tuple(shape), generator=generator)
        case "corners":
            found = corners[torch.randint(len(corners), tuple(shape), generator=generator)]
        case _:
            found = torch.full(tuple(shape), int(corners[draw(st.integers(0, len(corners) - 1))]))
    return found.to(dtype)


def codes(draw: Draw, shape: Sequence[int], dtype: torch.dtype = torch.int8) -> Tensor:
    limits = torch.iinfo(dtype)
    return numbers(draw, shape, limits.min, limits.max, dtype)


def biases(draw: Draw, shape: Sequence[int]) -> tuple[Tensor, int]:
    """Draw an int32 tensor and the largest magnitude in it."""
    limit = 1 << draw(st.sampled_from([1, 12, 20, 30, 31]))
    return numbers(draw, shape, -limit, limit - 1, torch.int32), limit


def ends(draw: Draw) -> Arguments:
    """Draw zero point and limits: 8 or 16 bits, whole or cut off below as by a ReLU or above as by a ReLU6."""
    lowest, highest, least = draw(st.sampled_from([(-128, 127, -128), (-127, 127, -127), (-32768, 32767, 128)]))
    zero_point = draw(st.sampled_from([0, 3, lowest, highest]) | st.integers(lowest, highest))
    minimum = draw(st.sampled_from([lowest, zero_point]))
    maximum = draw(st.sampled_from([highest]) | st.integers(max(minimum, least), highest))
    return {"zero_point": zero_point, "minimum": minimum, "maximum": maximum}


def ratios(
    draw: Draw, spread: int, shape: Sequence[int] = (), *, bits: int = 31, least_shift: int = 1, limit: int = WIDE
) -> tuple[Tensor, int]:
    """Draw multipliers and a shift for numbers of at most ``spread``: corners, or such that results span the codes."""
    largest = min((1 << bits) - 1, (limit - 1) // spread)
    generator = seeded(draw(SEEDS))
    if draw(st.integers(0, 3)) == 0:
        corners = torch.tensor([0, 1, -1, largest // 2 + 1, largest, -largest])
        return corners[torch.randint(6, tuple(shape), generator=generator)], draw(st.integers(least_shift, 62))
    span = draw(st.sampled_from([3, 1 << 8, 1 << 16]))
    shift = min(max(floor(log2(largest) + log2(spread) - log2(2 * span)), least_shift), 60)
    factors = torch.rand(tuple(shape), generator=generator, dtype=torch.float64) * 4 - 2
    return torch.round(factors * (span / spread) * 2.0**shift).clamp(-largest, largest).to(torch.int64), shift


def batch(draw: Draw, most: int = 2) -> tuple[int, ...]:
    return tuple(draw(st.lists(st.integers(1, 3), min_size=0, max_size=most)))


@st.composite
def requantized(draw: Draw) -> Arguments:
    shape = (*batch(draw), draw(SIZES), draw(SIZES))
    vector = draw(st.sampled_from([(), (shape[-1],), (shape[-2], 1), shape]))
    x, (bias, limit) = codes(draw, shape, draw(CODES)), biases(draw, vector)
    multiplier, shift = ratios(draw, limit + (1 << 15), draw(st.sampled_from([(), vector])))
    return {"x": x, "bias": bias, "multiplier": multiplier.to(torch.int32), "shift": shift} | ends(draw)


def two(draw: Draw) -> tuple[Tensor, Tensor]:
    shape = (*batch(draw), draw(SIZES), draw(SIZES))
    other = draw(st.sampled_from([shape, shape[-1:], (shape[-2], 1), (1,) * len(shape)]))
    return codes(draw, shape, draw(CODES)), codes(draw, other, draw(CODES))


@st.composite
def added(draw: Draw) -> Arguments:
    x, y = two(draw)
    pair, shift = ratios(draw, 1 << 15, (2,), bits=46, limit=WIDE // 3)
    offset = draw(st.integers(-(1 << shift), 1 << shift) | st.integers(-WIDE // 4, WIDE // 4)) // 4
    first, second = pair.tolist()
    return (
        {"x": x, "y": y, "x_multiplier": first, "y_multiplier": second}
        | {"offset": offset, "shift": shift}
        | ends(draw)
    )


@st.composite
def multiplied(draw: Draw) -> Arguments:
    x, y = two(draw)
    zeros = [draw(st.integers(torch.iinfo(each.dtype).min, torch.iinfo(each.dtype).max)) for each in (x, y)]
    spread = prod(2 * (torch.iinfo(each.dtype).max + 1) for each in (x, y))
    multiplier, shift = ratios(draw, spread, bits=46)
    return {"x": x, "y": y, "x_zero_point": zeros[0], "y_zero_point": zeros[1]} | {
        "multiplier": int(multiplier),
        "shift": shift,
        **ends(draw),
    }


@st.composite
def averaged(draw: Draw) -> Arguments:
    shape = (*batch(draw), draw(SIZES), draw(SIZES))
    axes = draw(st.lists(st.integers(0, len(shape) - 1), min_size=1, unique=True))
    x, limit = codes(draw, shape, draw(CODES)), prod(shape[axis] for axis in axes) << 15
    multiplier, shift = ratios(draw, 2 * limit)
    signed = [axis - len(shape) if draw(st.booleans()) else axis for axis in axes]
    return {"x": x, "axes": signed, "keeps_axes": draw(st.booleans()), "offset": draw(st.integers(-limit, limit))} | {
        "multiplier": int(multiplier),
        "shift": shift,
        **ends(draw),
    }


@st.composite
def tabled(draw: Draw) -> Arguments:
    shape = (*batch(draw), draw(SIZES), draw(SIZES))
    return {"x": codes(draw, shape), "table": codes(draw, (256,), draw(CODES))}


def weighted(draw: Draw, *, limit: int = WIDE) -> Arguments:
    """Draw what all linear operators take."""
    inner, outer = draw(SIZES), draw(SIZES)
    x, weight = codes(draw, (*batch(draw), draw(SIZES), inner)), codes(draw, (outer, inner))
    bias, largest = biases(draw, (outer,))
    multiplier, shift = ratios(draw, (inner << 14) + largest, (outer,), limit=limit)
    return {"x": x, "weight": weight, "bias": bias, "multiplier": multiplier.to(torch.int32), "shift": shift}


@st.composite
def linear(draw: Draw) -> Arguments:
    return weighted(draw) | ends(draw)


def residual(draw: Draw, shape: Sequence[int], shift: int) -> Arguments:
    """Draw a residual whose multiplier keeps it below 2^61, often of the size of the codes."""
    limit = draw(st.sampled_from([1 << 46, min(1 << max(shift - 7, 0), 1 << 46)]))
    return {"residual": codes(draw, shape, draw(CODES)), "residual_multiplier": draw(st.integers(-limit, limit))}


@st.composite
def linear_add(draw: Draw) -> Arguments:
    given_ = weighted(draw, limit=WIDE // 2)
    shape = (*given_["x"].shape[:-1], len(given_["weight"]))
    return given_ | residual(draw, shape, given_["shift"]) | ends(draw)


@st.composite
def linear_table(draw: Draw) -> Arguments:
    table = codes(draw, (256,), draw(CODES))
    return weighted(draw) | {"table": table, "zero_point": draw(st.integers(-128, 127))}


def windowed(draw: Draw, *, limit: int = WIDE) -> Arguments:
    """Draw what both convolutions take."""
    pairs = st.tuples(st.integers(1, 3), st.integers(1, 3)).map(list)
    kernel, stride, dilation = draw(pairs), draw(pairs), draw(pairs)
    padding = draw(st.tuples(st.integers(0, 3), st.integers(0, 3)).map(list))
    groups, per_group, out = (draw(st.integers(1, 4)) for _ in range(3))
    least = [max(d * (k - 1) + 1 - 2 * p, 1) for d, k, p in zip(dilation, kernel, padding, strict=True)]
    size = [each + draw(st.integers(0, 6)) for each in least]
    x = codes(draw, (draw(st.integers(1, 2)), groups * per_group, *size))
    bias, largest = biases(draw, (groups * out,))
    multiplier, shift = ratios(draw, (per_group * prod(kernel) << 15) + largest, (groups * out,), limit=limit)
    tensors = {"x": x, "weight": codes(draw, (groups * out, per_group, *kernel)), "bias": bias}
    options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    zero = draw(st.sampled_from([-128, 0, 127]) | st.integers(-128, 127))
    return tensors | {"multiplier": multiplier.to(torch.int32), "shift": shift, "x_zero_point": zero, **options}


@st.composite
def conv2d(draw: Draw) -> Arguments:
    return windowed(draw) | ends(draw)


@st.composite
def conv2d_add(draw: Draw) -> Arguments:
    given_ = windowed(draw, limit=WIDE // 2)
    options = (given_[each] for each in ("stride", "padding", "dilation", "groups"))
    shape = torch.nn.functional.conv2d(given_["x"].float(), given_["weight"].float(), None, *options).shape
    return given_ | residual(draw, shape, given_["shift"]) | ends(draw)


@st.composite
def matmul(draw: Draw) -> Arguments:
    lead, rows, inner, columns = batch(draw), draw(SIZES), draw(SIZES), draw(SIZES)
    other = draw(st.sampled_from([lead, (), (1,) * len(lead)]))
    multiplier, shift = ratios(draw, inner << 14)
    x, y = codes(draw, (*lead, rows, inner)), codes(draw, (*other, inner, columns))
    return {"x": x, "y": y, "multiplier": int(multiplier), "shift": shift} | ends(draw)


def score_bias(draw: Draw, lead: tuple[int, ...], queries: int, keys: int) -> Tensor | None:
    """Draw nothing, any bias, or masks: of some keys, of rows, of everything."""
    shape = draw(st.sampled_from([(*lead, queries, keys), (queries, keys), (*(1 for _ in lead), 1, keys), (keys,)]))
    kind = draw(st.sampled_from(["none", "any", "keys", "rows", "all"]))
    if kind == "none":
        return None
    found, _ = biases(draw, shape)
    found = found.clamp(MASK, -MASK)
    generator = seeded(draw(SEEDS))
    match kind:
        case "keys":
            return torch.where(torch.rand(shape, generator=generator) < 0.5, MASK, found // 4096).to(torch.int32)
        case "rows":
            masked = torch.rand((*shape[:-1], 1), generator=generator) < 0.5
            return torch.where(masked, MASK, found // 4096).to(torch.int32)
        case "all":
            return torch.full_like(found, MASK)
    return found


@st.composite
def attention(draw: Draw) -> Arguments:
    lead, queries, channels, keys, values = batch(draw), draw(SIZES), draw(SIZES), draw(SIZES), draw(SIZES)
    q, k = codes(draw, (*lead, queries, channels)), codes(draw, (*lead, channels, keys))
    spread = channels << 15
    bias = score_bias(draw, lead, queries, keys)
    largest = min((1 << 31) - 1, (WIDE - 1) // (spread + (1 << 31)))
    octaves = draw(st.sampled_from([0.1, 2.0, 8.0, 40.0, 1000.0]))
    score_shift = min(max(floor(log2(largest * spread / (octaves * 256))), 1), 60)
    score_multiplier = min(round(octaves * 256 / spread * 2**score_shift), largest)
    multiplier, shift = ratios(draw, 1 << 27, least_shift=21)
    scores = {"bias": bias, "score_multiplier": score_multiplier, "score_shift": score_shift}
    return {"q": q, "k": k, "v": codes(draw, (*lead, keys, values)), **scores} | {
        "multiplier": abs(int(multiplier)),
        "shift": shift,
        **ends(draw),
    }


@st.composite
def normalized(draw: Draw) -> Arguments:
    channels, dtype = draw(SIZES), draw(CODES)
    x = codes(draw, (*batch(draw), draw(SIZES), channels), dtype)
    if draw(st.booleans()):
        x = torch.where(torch.rand((*x.shape[:-1], 1), generator=seeded(draw(SEEDS))) < 0.5, x, x[..., :1])
    bias, largest = biases(draw, (channels,))
    multiplier, shift = ratios(draw, (ceil(sqrt(channels)) << 20) + 1 + largest, (channels,))
    most = WIDE - 1 - channels * channels * (1 << 30)
    epsilon = draw(st.sampled_from([1, channels * channels, most]) | st.integers(1, 1 << 20) | st.integers(1, most))
    return {"x": x, "bias": bias, "multiplier": multiplier.to(torch.int32), "epsilon": epsilon, "shift": shift} | ends(
        draw
    )


@st.composite
def interpolated(draw: Draw) -> Arguments:
    shape, size = (*batch(draw), draw(SIZES), draw(SIZES)), draw(SIZES)
    axis = draw(st.integers(0, len(shape) - 1))
    low, high = (numbers(draw, (size,), 0, shape[axis] - 1, torch.int64) for _ in range(2))
    weight = numbers(draw, (size, *(1 for _ in shape[axis + 1 :])), 0, 1 << 14, torch.int32)
    return {"x": codes(draw, shape, draw(CODES)), "low": low, "high": high, "weight": weight, "axis": axis}


@st.composite
def shifted_softmax(draw: Draw) -> Arguments:
    keys, n = draw(SIZES), draw(st.integers(1, 32))
    bounds = torch.iinfo(draw(st.sampled_from([torch.int8, torch.int16, torch.int32])))
    scores = numbers(draw, (*batch(draw), draw(SIZES), keys), bounds.min, bounds.max, getattr(torch, bounds.dtype))
    x0 = -draw(st.integers(1, 300) | st.integers(1, min((1 << 29) - 1, (WIDE - 1) // (keys << n))))
    return {"scores": scores, "x0": x0, "n": n, "maximum": draw(st.sampled_from([127, 32767]))}


@st.composite
def shifted_gelu(draw: Draw) -> Arguments:
    x = codes(draw, (*batch(draw), draw(SIZES), draw(SIZES)), draw(CODES))
    x0 = -draw(st.integers(1, 300) | st.integers(1, (1 << 17) - 1))
    multiplier, shift = ratios(draw, 1 << 22, bits=20)  # a gate of the size that it has where sums are cut
    return {"x": x, "x0": x0, "n": draw(st.sampled_from([1, 15, 23, 32])), "multiplier": int(multiplier)} | {
        "shift": shift,
        **ends(draw),
    }


@st.composite
def bounded_gelu(draw: Draw) -> Arguments:
    x = codes(draw, (*batch(draw), draw(SIZES), draw(SIZES)), draw(CODES))
    x0 = -draw(st.integers(1, 300) | st.integers(1, (1 << 29) - 1))
    multiplier, shift = ratios(draw, 1 << 31)
    bound = draw(st.sampled_from([0, 1, 127, 128, 32768]) | st.integers(0, 32768))
    return {"x": x, "x0": x0, "bound": bound, "multiplier": int(multiplier), "shift": shift} | ends(draw)


CALLS: Final[dict[str, st.SearchStrategy[Arguments]]] = {
    "requantize": requantized(),
    "int_add": added(),
    "int_multiply": multiplied(),
    "int_mean": averaged(),
    "int_table": tabled(),
    "int_linear": linear(),
    "int_linear_add": linear_add(),
    "int_linear_table": linear_table(),
    "int_conv2d": conv2d(),
    "int_conv2d_add": conv2d_add(),
    "int_matmul": matmul(),
    "int_attention": attention(),
    "int_layer_norm": normalized(),
    "int_rms_norm": normalized(),
    "int_interpolate": interpolated(),
    "shiftmax": shifted_softmax(),
    "shift_gelu": shifted_gelu(),
    "lambda_shift_gelu": bounded_gelu(),
}

operators = pytest.mark.parametrize("name", sorted(CALLS))
odd = pytest.mark.parametrize("size", ODD)
limits = pytest.mark.parametrize("ends", [INT8_ENDS, INT16_ENDS, RELU_ENDS], ids=["int8", "int16", "relu"])


def check(name: str, arguments: Arguments, *, stored_from: int | None = None) -> Tensor:
    """Compare both and return what they agree on."""
    expected = torch_result(name, arguments)
    assert_identical(onnx_result(name, arguments, stored_from=stored_from), expected)
    if "maximum" in arguments:
        ends = arguments.get("minimum", 0), arguments["maximum"]
        assert expected.dtype == rescaling.codes_type(*ends)
    return expected


def any_codes(*shape: int, seed: int = 0, dtype: torch.dtype = torch.int8) -> Tensor:
    bounds = torch.iinfo(dtype)
    return torch.randint(bounds.min, bounds.max + 1, shape, generator=seeded(seed), dtype=dtype)


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


@odd
@limits
@pytest.mark.parametrize("name", ["int_layer_norm", "int_rms_norm"])
@pytest.mark.parametrize("dtype", [torch.int8, torch.int16], ids=str)
def test_norm_of_odd_sizes(ends: Arguments, size: int, name: str, dtype: torch.dtype) -> None:
    low, high = torch.iinfo(dtype).min, torch.iinfo(dtype).max
    x = any_codes(7, size, dtype=dtype)
    x[1], x[2], x[3] = low, high, 0
    x[4], x[4, 0] = low, high
    x[5, ::2], x[5, 1::2] = low, high
    vectors = {"bias": any_numbers(size, low=-(2**22), high=2**22)}
    vectors["multiplier"] = any_numbers(size, low=-(2**31) + 1, high=2**31 - 1, seed=2)
    for epsilon in (1, size * size, 2**40):
        check(name, {"x": x, **vectors, "epsilon": epsilon, "shift": 46} | ends)


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
    assert_identical(found, _over_root(x, power))
