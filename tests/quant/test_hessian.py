from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rounded_layer import by_gptq
from torch import Tensor

from normfuse.errors import BadInput, UsageError
from normfuse.quant import InputMeans, InputMoments, PerChannel, corrected_bias, symmetric
from normfuse.quant.integer_type import INT4


def _normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _moments(x: Tensor, x_float: Tensor | None = None) -> InputMoments:
    moments = InputMoments(x.shape[-1], groups=1 if x.ndim == 2 else x.shape[0])
    moments.update(x, x_float)
    return moments


def test_moments_are_the_products_of_the_inputs() -> None:
    x, drift = _normal(2, 11, 5).double(), _normal(2, 11, 5, seed=1).double() / 8
    moments = _moments(x, x + drift)
    assert moments.count == 11
    torch.testing.assert_close(moments.gram, x.mT @ x)
    assert moments.drift is not None
    torch.testing.assert_close(moments.drift, x.mT @ drift)
    torch.testing.assert_close(moments.square_drift, drift.square().sum(dim=(1, 2)))
    torch.testing.assert_close(moments.mean_quantized, x.mean(dim=1))
    torch.testing.assert_close(moments.mean_float, (x + drift).mean(dim=1))


@given(st.integers(0, 1000), st.lists(st.integers(0, 40), max_size=4), st.booleans())
def test_batches_and_their_order_do_not_show(seed: int, cuts: list[int], merges: bool) -> None:
    x, x_float = _normal(40, 6, seed=seed), _normal(40, 6, seed=seed) + _normal(40, 6, seed=seed + 1) / 16
    order = torch.randperm(40, generator=torch.Generator().manual_seed(seed))
    whole, parts = _moments(x, x_float), InputMoments(6)
    for rows in torch.tensor_split(order, sorted(cuts)):
        if merges:
            parts.merge(_moments(x[rows], x_float[rows]))
        else:
            parts.update(x[rows], x_float[rows])
    assert parts.count == whole.count
    # Sums of 40 products of at most 25 in another order, at 2 ** -53 each.
    for name in ("gram", "drift", "total", "total_drift", "square_drift"):
        torch.testing.assert_close(getattr(parts, name), getattr(whole, name), atol=40 * 40 * 25 * 2.0**-53, rtol=0)
    weight = _normal(3, 6, seed=seed + 2)
    params = symmetric(weight.abs().amax(dim=1), INT4, PerChannel(0))
    assert torch.equal(by_gptq(weight, params, parts), by_gptq(weight, params, whole))


def test_the_same_inputs_have_no_drift() -> None:
    x = _normal(7, 4)
    moments = _moments(x)
    assert moments.drift is None
    moments.merge(_moments(x, x + 1))
    assert moments.drift is not None
    torch.testing.assert_close(moments.drift, x.double().sum(dim=0)[None, :, None].expand(1, 4, 4))


@pytest.mark.parametrize("groups", [1, 3])
def test_means_alone_are_those_of_the_moments(groups: int) -> None:
    shape = (2100, 5) if groups == 1 else (groups, 2100, 5)  # more rows than a slice
    x, x_float = _normal(*shape), _normal(*shape, seed=1)
    moments, means = InputMoments(5, groups=groups), InputMeans(5, groups=groups)
    for sums in (moments, means):
        sums.update(x, x_float)
    assert torch.equal(means.mean_quantized, moments.mean_quantized)
    assert torch.equal(means.mean_float, moments.mean_float)
    with pytest.raises(UsageError, match="inputs of shapes"):
        means.update(x, x_float[..., :4])


def test_a_corrected_bias_gives_back_the_mean() -> None:
    x, x_float = _normal(2, 30, 4) + 2, _normal(2, 30, 4, seed=1)
    weight, quantized, bias = _normal(6, 4), _normal(6, 4, seed=2), _normal(6)
    moments = _moments(x, x_float)
    means = {"mean_quantized": moments.mean_quantized, "mean_float": moments.mean_float}

    def mean_output(inputs: Tensor, values: Tensor) -> Tensor:
        return (inputs.double() @ values.double().reshape(2, 3, 4).mT).mean(dim=1).flatten()

    wanted = mean_output(x_float, weight) + bias
    torch.testing.assert_close(mean_output(x, quantized) + corrected_bias(bias, weight, quantized, **means), wanted)
    without = corrected_bias(None, weight, quantized, **means)
    torch.testing.assert_close(corrected_bias(bias, weight, quantized, **means), without + bias)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("is_float", [False, True])
def test_values_that_are_not_finite_are_refused_and_change_nothing(value: float, is_float: bool) -> None:
    good, bad = _normal(3, 4), _normal(3, 4)
    bad[1, 2] = value
    moments = _moments(good)
    with pytest.raises(BadInput, match="NaN"):
        moments.update(*((good, bad) if is_float else (bad, good)))
    assert moments.count == 3
    assert bool(moments.gram.isfinite().all())


@pytest.mark.parametrize("shape", [(3, 5), (2, 3, 4), (4,), (1, 1, 3, 4)])
def test_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match="rows, 4"):
        InputMoments(4).update(torch.zeros(shape))


def test_rows_that_do_not_fit_each_other_are_refused() -> None:
    with pytest.raises(UsageError, match="float model"):
        InputMoments(4).update(torch.zeros(3, 4), torch.zeros(1, 4))
    with pytest.raises(UsageError, match="merged"):
        InputMoments(4).merge(InputMoments(5))
