from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from normfuse.errors import BadInput, UsageError
from normfuse.quant import DyadicHistogram

FLOAT32 = st.floats(allow_nan=False, allow_infinity=False, width=32)
VALUES = st.lists(FLOAT32, max_size=40)
BINS = st.sampled_from([2, 4, 16, 256])


def _histogram(*batches: list[float] | Tensor, bins: int = 16) -> DyadicHistogram:
    histogram = DyadicHistogram(bins=bins)
    for batch in batches:
        histogram.update(torch.as_tensor(batch, dtype=torch.float32))
    return histogram


@given(VALUES, st.randoms(), st.integers(0, 40), st.integers(0, 40), BINS)
def test_any_order_split_and_merging_ends_in_one_state(
    values: list[float], random: object, one: int, other: int, bins: int
) -> None:
    shuffled = list(values)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    first, second = min(one, other), max(one, other)
    merged = _histogram(shuffled[second:], bins=bins)
    merged.merge(_histogram(shuffled[:first], shuffled[first:second], bins=bins))
    singles = _histogram(*([value] for value in shuffled), bins=bins)
    assert merged == singles == _histogram(values, bins=bins)


@given(VALUES, BINS)
def test_every_value_lies_in_its_bin_and_the_bins_are_as_narrow_as_they_can_be(values: list[float], bins: int) -> None:
    histogram = _histogram(values, bins=bins)
    expected = np.zeros(bins, dtype=np.int64)
    for value in values:
        ratio_numerator, ratio_denominator = value.as_integer_ratio()
        power = histogram.exponent  # floor(value / 2 ** power) in integers, exact
        index = (ratio_numerator << max(-power, 0)) // (ratio_denominator << max(power, 0))
        expected[index + bins // 2] += 1
    np.testing.assert_array_equal(histogram.counts, expected)
    if histogram.exponent > -120:
        end = math.ldexp(bins // 2, histogram.exponent - 1)
        assert histogram.maximum >= end or histogram.minimum < -end


@given(VALUES)
def test_extremes_are_exact(values: list[float]) -> None:
    histogram = _histogram(values)
    assert histogram.minimum == min(values, default=math.inf)
    assert histogram.maximum == max(values, default=-math.inf)
    assert histogram.total == len(values)


def test_the_negative_end_is_part_of_the_first_bin_and_the_positive_one_is_not() -> None:
    assert _histogram([-8.0], bins=16).width == 1.0
    assert _histogram([8.0], bins=16).width == 2.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int8, torch.uint8])
def test_the_dtype_of_equal_values_does_not_matter(dtype: torch.dtype) -> None:
    values = torch.tensor([0.0, 1.0, 3.0, 5.0, 96.0])
    histogram = DyadicHistogram()
    histogram.update(values.to(dtype))
    assert histogram == _histogram(values, bins=histogram.bins)


def test_float64_beyond_float32() -> None:
    histogram = DyadicHistogram(bins=4)
    histogram.update(torch.tensor([1e300, -1e-300], dtype=torch.float64))
    assert histogram.counts.tolist() == [0, 1, 0, 1]


def test_large_tensors_are_counted_in_pieces() -> None:
    values = torch.randn(3, 700_001, generator=torch.Generator().manual_seed(1))
    whole, rows = DyadicHistogram(), DyadicHistogram()
    whole.update(values.t())
    for row in values:
        rows.update(row)
    assert whole == rows
    assert whole.total == values.numel()
    expected, _ = np.histogram(values.numpy().astype(np.float64), bins=whole.edges())
    np.testing.assert_array_equal(whole.counts, expected)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_refused_and_changes_nothing(bad: float) -> None:
    histogram = _histogram([1.0, 2.0])
    with pytest.raises(BadInput, match="NaN or infinity") as caught:
        histogram.update(torch.tensor([1e9, bad]), where="blocks.3.mlp")
    assert caught.value.where == "blocks.3.mlp"
    assert histogram == _histogram([1.0, 2.0])


def test_empty_tensors_change_nothing() -> None:
    assert _histogram([]) == DyadicHistogram(bins=16)


def test_merging_does_not_change_the_other() -> None:
    other = _histogram([3.0])
    _histogram([1e6]).merge(other)
    assert other == _histogram([3.0])


@pytest.mark.parametrize("bins", [0, 1, 3, 100])
def test_bins_are_a_power_of_two(bins: int) -> None:
    with pytest.raises(UsageError, match="power of two"):
        DyadicHistogram(bins=bins)


def test_different_bins_cannot_be_merged() -> None:
    with pytest.raises(UsageError, match="16 and 32"):
        _histogram([1.0]).merge(_histogram([1.0], bins=32))
