"""Norms in integers are within a derived bound of those in float64."""

from __future__ import annotations

from math import sqrt
from typing import Final

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from integer_calls import WIDE, Arguments, any_codes, any_numbers, codes_of, limits, odd
from onnx_calls import torch_result
from torch import Tensor
from torch.nn import functional

from normfuse.testing import seeded

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
