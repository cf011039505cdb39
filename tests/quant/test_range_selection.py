from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from normfuse.errors import UsageError
from normfuse.quant import (
    INT4,
    INT8,
    INT16,
    UINT4,
    UINT8,
    DyadicHistogram,
    IntegerType,
    Range,
    RangeMethod,
    candidates,
    quantize_dequantize,
)
from normfuse.quant.float_type import FLOAT8
from normfuse.quant.range_losses import entropy_loss, squared_error_loss

COUNT = 20_000
DISTRIBUTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "normal": lambda z: z,
    "shifted": lambda z: z + 3,
    "relu": torch.relu,
    "gelu": lambda z: torch.nn.functional.gelu(2 * z),
    "negative": lambda z: -torch.exp(z),
    "heavy": lambda z: z * torch.exp(1.2 * z.roll(1)),
    "softmax": lambda z: torch.softmax(2 * z.reshape(-1, 200), dim=-1).flatten(),
    "constant": lambda z: torch.full_like(z, 0.7),
}


def _sample(name: str, *, outlier: float | None = None) -> Tensor:
    values = DISTRIBUTIONS[name](torch.randn(COUNT, generator=torch.Generator().manual_seed(3)))
    return values if outlier is None else torch.cat([values, torch.tensor([outlier])])


def _observed(values: Tensor) -> DyadicHistogram:
    histogram = DyadicHistogram()
    histogram.update(values)
    return histogram


def _error(values: Tensor, found: Range, kind: IntegerType, *, is_symmetric: bool = False) -> float:
    params = found.quantizer(kind, is_symmetric=is_symmetric)
    return float((quantize_dequantize(values, params).double() - values.double()).square().mean())


@pytest.mark.parametrize("kind", [UINT8, INT4], ids=str)
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_squared_error_loss_is_the_error_of_the_quantizer(name: str, kind: IntegerType) -> None:
    values = _sample(name)
    histogram = _observed(values)
    full = candidates(histogram, kind, methods=[RangeMethod.MIN_MAX])["min-max"]
    for fraction in (1.0, 0.4, 0.05):
        tried = Range(full.minimum * fraction, full.maximum * fraction)
        loss = squared_error_loss(histogram, kind, is_symmetric=False)
        estimate = loss(np.array([tried.minimum]), np.array([tried.maximum])).item()
        # A value is displaced inside its bin by at most a width w, so the root mean square error moves by at most w.
        assert abs(math.sqrt(estimate) - math.sqrt(_error(values, tried, kind))) <= histogram.width


@pytest.mark.parametrize("is_symmetric", [False, True])
@pytest.mark.parametrize("kind", [INT8, INT4], ids=str)
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_least_squared_error_beats_every_other_candidate(name: str, kind: IntegerType, is_symmetric: bool) -> None:
    values = _sample(name)
    histogram = _observed(values)
    found = candidates(histogram, kind, is_symmetric=is_symmetric)
    errors = {label: _error(values, one, kind, is_symmetric=is_symmetric) for label, one in found.items()}
    # The search's loss differs from the error by the bin width in root mean square, on either side.
    assert math.sqrt(errors["mse"]) <= math.sqrt(min(errors.values())) + 2 * histogram.width


@pytest.mark.parametrize("kind", [UINT8, UINT4], ids=str)
@pytest.mark.parametrize("name", ["normal", "shifted", "gelu", "heavy"])
def test_least_squared_error_is_near_a_full_search_of_both_ends(name: str, kind: IntegerType) -> None:
    values = _sample(name)
    histogram = _observed(values)
    fractions = np.exp2(-np.arange(0, 49) / 8)
    low, high = (
        end.ravel() for end in np.meshgrid(min(0.0, float(values.min())) * fractions, float(values.max()) * fractions)
    )
    loss = squared_error_loss(histogram, kind, is_symmetric=False)
    best = loss(low, high).min()
    found = candidates(histogram, kind, methods=[RangeMethod.MSE])["mse"]
    # Alternating between the ends may stop beside the best pair; a 2 % larger error is 0.09 dB.
    assert loss(np.array([found.minimum]), np.array([found.maximum])).item() <= 1.02 * best


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_percentiles_equal_quantiles_up_to_one_bin(name: str) -> None:
    values = _sample(name)
    histogram = _observed(values)
    found = candidates(histogram, UINT8, methods=[RangeMethod.PERCENTILE])
    for percent, lost in ((99.9, 1_000), (99.99, 10_000), (99.999, 100_000)):
        kept = values.numel() - values.numel() // lost
        ordered = values.sort().values
        upper, lower = float(ordered[kept - 1]), float(ordered[-kept])
        one = found[f"percentile-{percent}"]
        assert max(upper, 0.0) <= one.maximum <= max(upper + histogram.width, 0.0)
        assert min(lower - histogram.width, 0.0) <= one.minimum <= min(lower, 0.0)


def test_symmetric_percentiles_are_those_of_the_magnitude() -> None:
    values = _sample("negative")
    histogram = _observed(values)
    one = candidates(histogram, INT8, is_symmetric=True, methods=[RangeMethod.PERCENTILE])["percentile-99.9"]
    magnitude = float(values.abs().sort().values[values.numel() - values.numel() // 1_000 - 1])
    assert magnitude <= one.maximum == -one.minimum <= magnitude + histogram.width


def _plain_divergence(histogram: DyadicHistogram, first: int, last: int, levels: int) -> float:
    """The textbook loop for the bins ``first ... last - 1``, bin 0 already limited by the caller."""
    counts = histogram.counts.astype(float)
    reference = counts[first:last].copy()
    quantized = counts[first:last].copy()
    reference[0] += counts[:first].sum()
    reference[-1] += counts[last:].sum()
    spread = np.zeros_like(quantized)
    limits = [(last - first) * cell // levels for cell in range(levels + 1)]
    for start, stop in pairwise(limits):
        occupied = reference[start:stop] > 0
        if occupied.any():
            spread[start:stop][occupied] = quantized[start:stop].sum() / occupied.sum()
    p, q = reference / reference.sum(), spread / quantized.sum()
    return float(sum(a * math.log(a / b) if b > 0 else math.inf for a, b in zip(p, q, strict=True) if a > 0))


def test_entropy_loss_equals_the_textbook_loop() -> None:
    histogram = DyadicHistogram(bins=512)
    histogram.update(_sample("shifted"))
    half = histogram.bins // 2
    histogram.counts[half] = min(histogram.counts[half], max(histogram.counts[half - 1], histogram.counts[half + 1]))
    for first, last in ((half - 40, half + 250), (half - 3, half + 77), (half, half + 16), (half - 90, half + 256)):
        lower, upper = (first - half) * histogram.width, (last - half) * histogram.width
        found = entropy_loss(histogram, UINT4)(np.array([lower]), np.array([upper])).item()
        # Sums of some 300 terms of size 1 in float64, in another order.
        assert found == pytest.approx(_plain_divergence(histogram, first, last, 16), rel=0, abs=1e-11)


def test_entropy_cuts_a_lone_outlier_and_keeps_the_rest() -> None:
    found = candidates(_observed(_sample("normal", outlier=60.0)), INT8, methods=[RangeMethod.ENTROPY])["entropy"]
    assert 2.5 <= found.maximum <= 6
    assert -6 <= found.minimum <= -2.5


def test_entropy_falls_back_to_everything_where_bins_are_wider_than_codes() -> None:
    values = _sample("normal", outlier=1e6)
    found = candidates(_observed(values), INT8, methods=[RangeMethod.ENTROPY])["entropy"]
    assert found.maximum == 1e6


@pytest.mark.parametrize("outlier", [30.0, 300.0, 1500.0])
def test_eight_bit_ranges_stay_good_beside_one_outlier(outlier: float) -> None:
    values = _sample("normal", outlier=outlier)
    histogram = _observed(values)
    best = min(_error(values, Range(-t, t), INT8) for t in outlier * np.exp2(-np.arange(0, 100) / 9))
    found = candidates(histogram, INT8, methods=[RangeMethod.MSE])["mse"]
    assert _error(values, found, INT8) <= 1.02 * best


def test_the_bulk_is_resolved_up_to_the_stated_outlier() -> None:
    """With an outlier 4,000 deviations away a bin is one deviation at most, so a percentile still finds the bulk."""
    histogram = _observed(_sample("normal", outlier=4000.0))
    assert histogram.width <= 1.0
    found = candidates(histogram, INT8, methods=[RangeMethod.PERCENTILE])["percentile-99.9"]
    assert 3.0 <= found.maximum <= 4.1


def test_sixteen_bits_keep_almost_everything() -> None:
    values = _sample("normal")
    found = candidates(_observed(values), INT16)
    errors = {label: _error(values, one, INT16) for label, one in found.items()}
    assert errors["mse"] <= 1.02 * min(errors.values())
    assert found["mse"].maximum >= 0.95 * float(values.max())


@pytest.mark.parametrize("is_symmetric", [False, True])
@pytest.mark.parametrize("values", [[0.0], [-0.0, 0.0], [5.0], [-5.0], [1e-45], [3e38, -3e38], [-1.0, 1e30]], ids=str)
def test_extreme_tensors_have_usable_ranges(values: list[float], is_symmetric: bool) -> None:
    for found in candidates(_observed(torch.tensor(values)), INT8, is_symmetric=is_symmetric).values():
        assert found.minimum <= 0.0 <= found.maximum
        params = found.quantizer(INT8, is_symmetric=is_symmetric)
        assert bool(torch.isfinite(quantize_dequantize(torch.tensor(values), params)).all())


def test_scaling_by_a_power_of_two_scales_the_ranges() -> None:
    values = _sample("gelu")
    small, large = (candidates(_observed(values * factor), UINT8) for factor in (1.0, 2.0**20))
    for label, found in small.items():
        assert large[label] == Range(found.minimum * 2.0**20, found.maximum * 2.0**20)


def test_labels_and_order() -> None:
    found = candidates(_observed(_sample("normal")), UINT8)
    assert list(found) == [
        "min-max",
        "percentile-99.9",
        "percentile-99.99",
        "percentile-99.999",
        "mse",
        "entropy",
    ]


def test_a_tensor_never_observed_has_no_range() -> None:
    with pytest.raises(UsageError, match="never observed"):
        candidates(DyadicHistogram(), UINT8)


@pytest.mark.parametrize(("low", "high"), [(1.0, 0.0), (math.nan, 0.0), (0.0, math.inf)])
def test_impossible_ranges_cannot_be_built(low: float, high: float) -> None:
    with pytest.raises(UsageError):
        Range(low, high)


@pytest.mark.parametrize("name", DISTRIBUTIONS)
@pytest.mark.parametrize("is_symmetric", [True, False])
def test_8_bit_floats_have_the_whole_range_alone(name: str, is_symmetric: bool) -> None:
    values = _sample(name, outlier=-77.0)
    found = candidates(_observed(values), FLOAT8, is_symmetric=is_symmetric)
    largest = float(values.abs().max())
    assert found == {"min-max": Range(-largest, largest)}
    assert candidates(_observed(values), FLOAT8, methods=[RangeMethod.MSE]) == found
    params = found["min-max"].quantizer(FLOAT8, is_symmetric=is_symmetric)
    assert params.largest.item() == -params.smallest.item() == pytest.approx(largest, rel=1e-6)


def test_a_lopsided_range_of_8_bit_floats_is_as_wide_as_its_larger_side() -> None:
    assert Range(-3.0, 448.0).quantizer(FLOAT8).scale.item() == 1.0
    assert Range(-896.0, 1.0).quantizer(FLOAT8, is_symmetric=False).scale.item() == 2.0
    assert Range(-896.0, 1.0).quantizer(FLOAT8).zero_point.item() == 0
