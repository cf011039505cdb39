from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from normfuse.errors import UsageError
from normfuse.quant import (
    INT4,
    INT8,
    INT8_NARROW,
    SMALLEST_SCALE,
    UINT4,
    UINT8,
    IntegerType,
    PerChannel,
    PerGroup,
    PerTensor,
    QuantParams,
    asymmetric,
    dequantize,
    quantize,
    symmetric,
)
from normfuse.quant.float_type import FLOAT8

FINITE = st.floats(allow_nan=False, allow_infinity=False, width=32)
TYPES = st.sampled_from([INT4, UINT4, INT8, INT8_NARROW, UINT8, IntegerType(2, signed=True)])


@given(FINITE, FINITE, TYPES)
def test_asymmetric_zero_is_exact_and_ends_are_covered(one: float, other: float, kind: IntegerType) -> None:
    low, high = min(one, other), max(one, other)
    params = asymmetric(low, high, kind)
    scale = params.scale.double().item()
    assert dequantize(quantize(torch.zeros(1), params), params).item() == 0.0
    # Rounding the zero point moves both ends by half a step; rounding the scale to float32 adds eps per level.
    slack = scale * (0.5 + kind.levels * 2.0**-24)
    assert params.smallest.item() <= min(low, 0.0) + slack
    assert params.largest.item() >= max(high, 0.0) - slack


@given(FINITE, TYPES.filter(lambda kind: kind.signed))
def test_symmetric_covers_the_magnitude(value: float, kind: IntegerType) -> None:
    params = symmetric(abs(value), kind)
    assert params.zero_point.item() == 0
    assert params.largest.item() >= abs(value) * (1 - 2.0**-24)


def test_asymmetric_per_channel_equals_per_tensor_row_by_row() -> None:
    low, high = torch.tensor([-3.0, 0.5, -7.0]), torch.tensor([1.0, 2.0, -2.0])
    together = asymmetric(low, high, UINT8, PerChannel(1))
    alone = [asymmetric(float(a), float(b), UINT8) for a, b in zip(low, high, strict=True)]
    assert together.scale.tolist() == [params.scale.item() for params in alone]
    assert together.zero_point.tolist() == [params.zero_point.item() for params in alone]


def test_a_dead_channel_takes_the_largest_scale_beside_it() -> None:
    params = symmetric(torch.tensor([0.0, 12.7, 1.27]), INT8, PerChannel(0))
    assert params.scale[0] == params.scale[1] > params.scale[2]


def test_nothing_but_zeros_gets_scale_one() -> None:
    assert symmetric(0.0, INT8).scale.item() == asymmetric(0.0, 0.0, UINT8).scale.item() == 1.0


@pytest.mark.parametrize("magnitude", [1e-45, 1e-38, 2.0**-126])
def test_scales_never_become_subnormal(magnitude: float) -> None:
    assert symmetric(magnitude, INT8).scale.item() >= SMALLEST_SCALE
    assert asymmetric(-magnitude, magnitude, UINT8).scale.item() >= SMALLEST_SCALE


def test_stored_zero_point_has_the_type_of_the_codes() -> None:
    assert asymmetric(-1.0, 3.0, UINT8).stored_zero_point.dtype == torch.uint8
    assert symmetric(1.0, INT4).stored_zero_point.dtype == torch.int8


def _params(**changes: Any) -> QuantParams:
    given_values: dict[str, Any] = {
        "scale": torch.tensor(0.5),
        "zero_point": torch.tensor(3, dtype=torch.int32),
        "type": UINT8,
        "granularity": PerTensor(),
    }
    return QuantParams(**(given_values | changes))


@pytest.mark.parametrize("scale", [0.0, -1.0, math.inf, math.nan, 1e-40])
def test_impossible_scales_are_refused(scale: float) -> None:
    with pytest.raises(UsageError, match="scale"):
        _params(scale=torch.tensor(scale))


@pytest.mark.parametrize(
    "changes",
    [
        {"zero_point": torch.tensor(-1, dtype=torch.int32)},
        {"zero_point": torch.tensor(256, dtype=torch.int32)},
        {"zero_point": torch.tensor(3)},
        {"scale": torch.tensor(0.5, dtype=torch.float64)},
        {"scale": torch.tensor([0.5])},
        {"granularity": PerChannel(0)},
        {"granularity": PerGroup(0, 4)},
    ],
    ids=["below", "above", "int64", "float64", "shape", "granularity", "groups"],
)
def test_impossible_parameters_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        _params(**changes)


@pytest.mark.parametrize(("low", "high"), [(1.0, 0.0), (math.nan, 1.0), (0.0, math.inf)])
def test_impossible_ranges_are_refused(low: float, high: float) -> None:
    with pytest.raises(UsageError, match="range"):
        asymmetric(low, high, UINT8)


@pytest.mark.parametrize("magnitude", [-1.0, math.nan, math.inf, torch.tensor([1.0, math.inf])])
def test_impossible_magnitudes_are_refused(magnitude: float | Tensor) -> None:
    with pytest.raises(UsageError, match="magnitude"):
        symmetric(magnitude, INT8)


def test_unsigned_cannot_be_symmetric() -> None:
    with pytest.raises(UsageError, match="signed"):
        symmetric(1.0, UINT8)


@pytest.mark.parametrize("magnitude", [448.0, 1.0, 3.7e5, 1e30, 448 * 2.0**-14])
def test_the_largest_8_bit_float_stands_for_the_magnitude(magnitude: float) -> None:
    params = symmetric(magnitude, FLOAT8)
    assert params.scale.item() == pytest.approx(magnitude / 448, rel=2.0**-23)
    assert params.zero_point.item() == 0
    assert params.largest.item() == -params.smallest.item() == pytest.approx(magnitude, rel=2.0**-23)
    assert params.stored_zero_point.dtype is torch.float8_e4m3fn
    assert dequantize(quantize(torch.tensor([magnitude]), params), params).item() == pytest.approx(magnitude, rel=1e-6)


@pytest.mark.parametrize(
    ("scale", "raised"),
    [
        pytest.param(2.0**-14, 2.0**-14, id="float16 holds it"),
        pytest.param(2.0**-15, 2.0**-14, id="one octave below"),
        pytest.param(0.7 * 2.0**-14, 2.0**-14, id="part of one"),
        pytest.param(2.0**-18, 2.0**-14, id="four"),
        pytest.param(2.0**-19, 2.0**-15, id="five: as far as it may"),
        pytest.param(2.0**-40, 2.0**-36, id="many"),
    ],
)
def test_small_scales_of_8_bit_floats_are_raised_four_octaves_at_most(scale: float, raised: float) -> None:
    magnitude = 448 * scale
    params = symmetric(magnitude, FLOAT8)
    assert params.scale.item() == raised
    assert params.largest.item() >= magnitude
    # The largest keep their four digits of mantissa.
    x = torch.linspace(1 / 64, 1, 67) * magnitude
    error = (dequantize(quantize(x, params), params) - x).abs()
    subnormal = raised * 2.0**-10
    assert bool((error <= torch.maximum(x * 2.0**-4, torch.tensor(subnormal))).all())


def test_each_channel_is_raised_by_itself_and_dead_ones_are_as_their_neighbours() -> None:
    magnitudes = torch.tensor([448.0, 448 * 2.0**-16, 0.0, 448 * 2.0**-30])
    params = symmetric(magnitudes, FLOAT8, PerChannel(0))
    assert params.scale.tolist() == [1.0, 2.0**-14, 1.0, 2.0**-26]
    assert symmetric(0.0, FLOAT8).scale.item() == 1.0


def test_integers_are_not_raised() -> None:
    assert symmetric(127 * 2.0**-20, INT8).scale.item() == 2.0**-20
