"""Attention in integers is as near to softmax in float64 as its 8-bit weights allow."""

from __future__ import annotations

from decimal import Decimal, getcontext
from fractions import Fraction

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from integer_calls import ENDS, MASK, SEEDS, Arguments, any_codes, any_numbers, code, half_up, limits, odd
from onnx_calls import torch_result
from torch import Tensor

from normfuse.kernels.reference.attention import EXPONENTIALS
from normfuse.testing import seeded


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
