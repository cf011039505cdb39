from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from correlated_layer import correlated_layer
from hypothesis import given
from hypothesis import strategies as st
from rounded_layer import by_descent, by_gptq

from normfuse.quant import (
    INT4,
    InputMoments,
    IntegerType,
    PerChannel,
    PerGroup,
    QuantParams,
    WeightClip,
    quantize,
    shrink_drift,
    weight_params,
)

INT2 = IntegerType(2, signed=True)
INT3 = IntegerType(3, signed=True)


@pytest.mark.parametrize("kind", [INT2, INT3, INT4], ids=str)
def test_errors_fall_from_nearest_to_gptq_to_coordinate_descent(kind: IntegerType) -> None:
    ratios = []
    for seed in range(40):
        layer = correlated_layer(seed)
        params = weight_params(layer.weight, 0, kind, clip=WeightClip.MSE)
        nearest = layer.squared_error(quantize(layer.weight, params), params).sum()
        codes = by_gptq(layer.weight, params, layer.moments)
        improved = by_descent(layer.weight, params, layer.moments, start=codes)
        ratios.append([float(layer.squared_error(found, params).sum() / nearest) for found in (codes, improved)])
    after_gptq, after_descent = np.mean(ratios, axis=0)
    assert after_descent < after_gptq < 0.8


@given(st.integers(0, 10_000), st.booleans(), st.sampled_from([None, 4]))
def test_coordinate_descent_is_never_worse_and_ends_where_no_code_alone_is_better(
    seed: int, from_nearest: bool, group: int | None
) -> None:
    layer = correlated_layer(seed, out=3, inputs=7, drift=0.5)
    params = weight_params(layer.weight, 0, INT2, group=group)
    generator = torch.Generator().manual_seed(seed)
    start = None if from_nearest else torch.randint(-2, 2, layer.weight.shape, generator=generator, dtype=torch.int8)
    codes = by_descent(layer.weight, params, layer.moments, start=start, sweeps=100)
    first = quantize(layer.weight, params) if start is None else start
    error = layer.squared_error(codes, params)
    tolerance = 1 + 1e-10  # float64 sums of 60 squares, and of products as large in the moments
    assert bool((error <= layer.squared_error(first, params) * tolerance).all())
    for column, code in itertools.product(range(7), range(-2, 2)):
        other = codes.clone()
        other[:, column] = code
        assert bool((error <= layer.squared_error(other, params) * tolerance).all())


@pytest.mark.parametrize("seed", range(20))
def test_nothing_beats_trying_all_codes_and_little_is_lost(seed: int) -> None:
    layer = correlated_layer(seed, out=2, inputs=3, rows=9)
    params = weight_params(layer.weight, 0, INT2)
    every = torch.tensor(list(itertools.product(range(-2, 2), repeat=3)), dtype=torch.int8)
    least = torch.stack([layer.squared_error(row.expand(2, 3), params) for row in every]).amin(dim=0)
    nearest = layer.squared_error(quantize(layer.weight, params), params)
    for start in (None, by_gptq(layer.weight, params, layer.moments)):
        codes = by_descent(layer.weight, params, layer.moments, start=start)
        error = layer.squared_error(codes, params)
        assert bool((error >= least * (1 - 1e-6)).all())  # values are rounded to float32 on either side
        assert start is not None or bool((error <= nearest * (1 + 1e-6)).all())


@pytest.mark.parametrize("group", [None, 2])
def test_convolutions_are_rounded_group_by_group(group: int | None) -> None:
    layers = [correlated_layer(seed, out=2, inputs=12) for seed in range(3)]
    weight = torch.cat([layer.weight for layer in layers]).reshape(6, 4, 3)
    moments = InputMoments(12, groups=3)
    moments.update(torch.stack([layer.x for layer in layers]), torch.stack([layer.x_float for layer in layers]))
    moments = shrink_drift(moments)
    params = weight_params(weight, 0, INT3, group=group)
    codes = by_gptq(weight, params, moments)
    descended = by_descent(weight, params, moments)
    for index, layer in enumerate(layers):
        own = slice(2 * index, 2 * index + 2)
        alone = QuantParams(
            scale=params.scale[own],
            zero_point=params.zero_point[own],
            type=INT3,
            granularity=PerChannel(0) if group is None else PerGroup(1, group),
        )
        shrunk = shrink_drift(layer.moments)
        assert torch.equal(codes[own], by_gptq(weight[own], alone, shrunk))
        assert torch.equal(descended[own], by_descent(weight[own], alone, shrunk))
