"""GPTQ against slow references, one of which holds the inputs themselves."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from correlated_layer import Layer, correlated_layer
from numpy.typing import NDArray
from rounded_layer import by_descent, by_gptq
from torch import Tensor

from normfuse.errors import BadInput, UsageError
from normfuse.quant import (
    INT4,
    InputMoments,
    IntegerType,
    PerChannel,
    QuantParams,
    RoundingProblem,
    WeightClip,
    quantize,
    shrink_drift,
    symmetric,
    weight_params,
)
from normfuse.quant import gptq as gptq_module

INT2 = IntegerType(2, signed=True)
INT3 = IntegerType(3, signed=True)
UINT3 = IntegerType(3, signed=False)
Floats = NDArray[np.float64]


def _by_least_squares(layer: Layer, params: QuantParams, damping: float, order: list[int]) -> Tensor:
    """Round one input after another, each time solving for all that are still free by a stacked least squares."""
    x, x_float, weight = (values.double().numpy() for values in (layer.x, layer.x_float, layer.weight))
    share = np.sqrt(damping * np.mean(np.sum(x**2, axis=0)))
    inputs = weight.shape[1]
    stacked: Floats = np.concatenate([x, share * np.eye(inputs)])
    wanted: Floats = np.concatenate([x_float, share * np.eye(inputs)]) @ weight.T
    scale = params.granularity.spread(params.scale, weight.shape).expand(weight.shape).double().numpy()
    zero_point = params.granularity.spread(params.zero_point, weight.shape).expand(weight.shape).double().numpy()
    codes = np.zeros_like(weight)
    for index, column in enumerate(order):
        free = order[index:]
        best = np.linalg.lstsq(stacked[:, free], wanted, rcond=None)[0][0]
        code = np.rint(best / scale[:, column]) + zero_point[:, column]
        codes[:, column] = np.clip(code, params.type.minimum, params.type.maximum)
        value = (codes[:, column] - zero_point[:, column]) * scale[:, column]
        wanted = wanted - stacked[:, [column]] * value
    return torch.from_numpy(codes).to(params.type.torch_dtype)


def _by_inverse_hessian(layer: Layer, params: QuantParams, damping: float, order: list[int]) -> Tensor:
    """GPTQ as published: the error of a column goes to the others by the inverse Hessian, which loses the column."""
    x, weight = layer.x.double().numpy()[:, order], layer.weight.double().numpy()[:, order]
    gram = x.T @ x
    inverse = np.linalg.inv(gram + damping * np.mean(np.diag(gram)) * np.eye(len(order)))
    scale = params.scale.double().numpy()
    codes = np.zeros_like(weight)
    for column in range(len(order)):
        code = np.clip(np.rint(weight[:, column] / scale), params.type.minimum, params.type.maximum)
        error = (weight[:, column] - code * scale) / inverse[column, column]
        weight = weight - np.outer(error, inverse[column])
        inverse = inverse - np.outer(inverse[:, column], inverse[column]) / inverse[column, column]
        codes[:, order[column]] = code
    return torch.from_numpy(codes).to(params.type.torch_dtype)


def _order(layer: Layer, by_activation: bool) -> list[int]:
    lengths = layer.x.double().square().sum(dim=0)
    indices = lengths.argsort(descending=True) if by_activation else torch.arange(lengths.numel())
    return [int(index) for index in indices]


@pytest.mark.parametrize("by_activation", [True, False])
@pytest.mark.parametrize("kind", [INT2, INT4], ids=str)
@pytest.mark.parametrize("seed", range(4))
def test_gptq_is_the_published_algorithm(seed: int, kind: IntegerType, by_activation: bool) -> None:
    layer = correlated_layer(seed)
    params = weight_params(layer.weight, 0, kind, clip=WeightClip.MSE)
    codes = by_gptq(layer.weight, params, layer.moments, activation_order=by_activation, asymmetric_correction=False)
    assert torch.equal(codes, _by_inverse_hessian(layer, params, 0.01, _order(layer, by_activation)))


@pytest.mark.parametrize("by_activation", [True, False])
@pytest.mark.parametrize(("group", "kind"), [(None, INT3), (4, UINT3), (5, INT4)])
@pytest.mark.parametrize("damping", [0.01, 0.3])
def test_the_correction_is_least_squares_on_the_inputs(
    group: int | None, kind: IntegerType, damping: float, by_activation: bool
) -> None:
    layer = correlated_layer(3, drift=1.0)
    params = weight_params(layer.weight, 0, kind, group=group, is_symmetric=kind.signed)
    codes = by_gptq(layer.weight, params, layer.moments, damping=damping, activation_order=by_activation)
    assert torch.equal(codes, _by_least_squares(layer, params, damping, _order(layer, by_activation)))


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = correlated_layer(5, inputs=150, rows=300)
    params = weight_params(layer.weight, 0, INT3)
    whole = by_gptq(layer.weight, params, layer.moments)
    assert torch.equal(whole, _by_least_squares(layer, params, 0.01, _order(layer, True)))
    monkeypatch.setattr(gptq_module, "BLOCK", 7)
    assert torch.equal(by_gptq(layer.weight, params, layer.moments), whole)


@pytest.mark.parametrize("group", [None, 4])
def test_inputs_that_do_not_go_together_leave_every_weight_to_itself(group: int | None) -> None:
    weight = correlated_layer(0).weight
    moments = InputMoments(13)
    moments.update(torch.diag(torch.arange(1.0, 14.0)))
    params = weight_params(weight, 0, INT3, group=group, clip=WeightClip.MSE)
    nearest = quantize(weight.double(), params)
    assert torch.equal(by_gptq(weight, params, moments), nearest)
    assert torch.equal(by_descent(weight, params, moments), nearest)


@pytest.mark.parametrize("damping", [0.01, 0.0])
def test_dead_and_repeated_inputs(damping: float) -> None:
    layer = correlated_layer(1, rows=30)
    for x in (layer.x, layer.x_float):
        x[:, 4] = 0.0
        x[:, 7] = x[:, 2]
        x[:, 9:] = 1.5
    params = weight_params(layer.weight, 0, INT4)
    nearest = quantize(layer.weight.double(), params)
    codes = by_gptq(layer.weight, params, layer.moments, damping=damping)
    assert torch.equal(codes[:, 4], nearest[:, 4])
    assert float(layer.squared_error(codes, params).sum()) < float(layer.squared_error(nearest, params).sum())
    codes = by_descent(layer.weight, params, layer.moments, start=codes)
    assert torch.equal(codes[:, 4], nearest[:, 4])


def test_layers_that_never_saw_anything_are_rounded_to_nearest() -> None:
    weight = correlated_layer(0).weight
    params = weight_params(weight, 0, INT4)
    for moments in (InputMoments(13), shrink_drift(InputMoments(13))):
        assert torch.equal(by_gptq(weight, params, moments), quantize(weight.double(), params))
        assert torch.equal(by_descent(weight, params, moments), quantize(weight.double(), params))


def test_constant_and_dead_channels() -> None:
    layer = correlated_layer(2)
    layer.weight[1] = 0.0
    layer.weight[3] = 0.25
    params = weight_params(layer.weight, 0, INT4)
    moments = InputMoments(13)
    moments.update(layer.x)
    for codes in (
        by_gptq(layer.weight, params, moments),
        by_descent(layer.weight, params, moments),
    ):
        assert codes[1].tolist() == [0] * 13
        assert codes[3].tolist() == [7] * 13


def test_a_matrix_that_is_no_sum_of_squares_is_damped_more_or_refused() -> None:
    weight = torch.ones(1, 2)
    params = symmetric(torch.ones(1), INT4, PerChannel(0))
    moments = InputMoments(2)
    moments.gram = torch.tensor([[[1.0, 3.0], [3.0, 1.0]]], dtype=torch.float64)
    assert by_gptq(weight, params, moments).shape == (1, 2)
    moments.gram[0, 0, 1] = moments.gram[0, 1, 0] = 1e9
    with pytest.raises(BadInput, match="positive definite"):
        by_gptq(weight, params, moments)


def test_wide_layers_in_float32() -> None:
    layer = correlated_layer(6, inputs=700, rows=400, out=8)
    params = weight_params(layer.weight, 0, INT4, group=128)
    nearest = layer.squared_error(quantize(layer.weight, params), params)
    codes = by_gptq(layer.weight, params, layer.moments)
    assert codes.dtype == torch.int8
    assert float(layer.squared_error(codes, params).sum()) < 0.2 * float(nearest.sum())
    descended = by_descent(layer.weight, params, layer.moments, start=codes)
    assert bool((layer.squared_error(descended, params) <= layer.squared_error(codes, params) * (1 + 1e-9)).all())


@pytest.mark.parametrize("shape", [(4, 5), (3, 4, 2)])
def test_weights_that_do_not_fit_the_moments_are_refused(shape: tuple[int, ...]) -> None:
    params = symmetric(torch.ones(shape[0]), INT4, PerChannel(0))
    with pytest.raises(UsageError, match="beside"):
        RoundingProblem.of(torch.zeros(shape), params, InputMoments(4))
