"""Strategies that draw a call of every integer operator within its contract."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import ceil, floor, log2, prod, sqrt
from typing import Any, Final

import hypothesis.strategies as st
import torch
from integer_calls import MASK, SEEDS, WIDE, Arguments
from torch import Tensor

from normfuse.testing import seeded

__all__ = ["CALLS"]

Draw = Callable[[st.SearchStrategy[Any]], Any]

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


def tokens(draw: Draw) -> Tensor:
    """Draw rows of a stream: any, of one number, or of nothing but 0."""
    x = codes(draw, (*batch(draw), draw(SIZES), draw(SIZES)), draw(CODES))
    generator = seeded(draw(SEEDS))
    x = torch.where(torch.rand((*x.shape[:-1], 1), generator=generator) < 0.7, x, x[..., :1])
    return torch.where(torch.rand((*x.shape[:-1], 1), generator=generator) < 0.8, x, torch.zeros_like(x))


@st.composite
def token_codes(draw: Draw) -> Arguments:
    return {"x": tokens(draw), "is_centred": draw(st.booleans())}


@st.composite
def token_factors(draw: Draw) -> Arguments:
    x = tokens(draw)
    most = WIDE - 1 - x.shape[-1] ** 2 * (1 << 30)
    epsilon = draw(st.sampled_from([1, x.shape[-1] ** 2, most]) | st.integers(1, 1 << 20) | st.integers(1, most))
    return {"x": x, "epsilon": epsilon, "is_centred": draw(st.booleans())}


def by_token(draw: Draw) -> Arguments:
    """Draw what both linear maps of tokens take: factors of any size that the contract lets them have."""
    inner, outer = draw(SIZES), draw(SIZES)
    x, weight = codes(draw, (*batch(draw), draw(SIZES), inner)), codes(draw, (outer, inner))
    largest = min(1 << draw(st.sampled_from([1, 20, 24, 27])), (1 << 31) - 1)
    factors = numbers(draw, (*x.shape[:-1], 1), 0, largest, torch.int32)
    spread = (inner << 14) * largest
    token_shift = draw(st.sampled_from([max(spread.bit_length() - 29, 1)]) | st.integers(1, 40))
    bias, most = biases(draw, (outer,))
    multiplier, shift = ratios(draw, (spread >> token_shift) + 1 + most, (outer,))
    return {"x": x, "factors": factors, "weight": weight, "bias": bias, "multiplier": multiplier.to(torch.int32)} | {
        "token_shift": token_shift,
        "shift": shift,
    }


@st.composite
def linear_tokens(draw: Draw) -> Arguments:
    return by_token(draw) | ends(draw)


@st.composite
def linear_tokens_table(draw: Draw) -> Arguments:
    table = codes(draw, (256,), draw(CODES))
    return by_token(draw) | {"table": table, "zero_point": draw(st.integers(-128, 127))}


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
    "int_token_codes": token_codes(),
    "int_token_factors": token_factors(),
    "int_linear_tokens": linear_tokens(),
    "int_linear_tokens_table": linear_tokens_table(),
    "int_interpolate": interpolated(),
    "shiftmax": shifted_softmax(),
    "shift_gelu": shifted_gelu(),
    "lambda_shift_gelu": bounded_gelu(),
}
