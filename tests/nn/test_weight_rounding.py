"""Scales that follow are the formula's, start as calibrated, and a bias fits beside them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from normfuse.errors import UsageError
from normfuse.nn.weight_rounding import WeightRounding, distance_to_border
from normfuse.quant import INT8_NARROW, IntegerType, RoundedWeight, WeightClip, round_to_nearest, weight_params
from normfuse.testing import seeded

TYPES = [IntegerType(2, signed=True), IntegerType(3, signed=True), INT8_NARROW]
INPUT_SCALE = 0.02


def some_weight(*shape: int) -> Tensor:
    return torch.randn(shape, generator=seeded(6)) ** 3


def calibrated(weight: Tensor, type_: IntegerType) -> RoundedWeight:
    return round_to_nearest(weight, torch.zeros(len(weight)), type_, input_scale=INPUT_SCALE)


def following(weight: Tensor, type_: IntegerType) -> WeightRounding:
    return WeightRounding.of(calibrated(weight, type_), weight, input_scale=INPUT_SCALE, follows=True)


@pytest.mark.parametrize("type_", TYPES, ids=str)
@pytest.mark.parametrize("shape", [(9, 31), (5, 3, 3, 2)])
def test_nothing_is_different_before_the_first_step(type_: IntegerType, shape: tuple[int, ...]) -> None:
    weight = some_weight(*shape)
    found, wanted = following(weight, type_).rounded(weight, torch.zeros(shape[0])), calibrated(weight, type_)
    assert torch.equal(found.params.scale, wanted.params.scale)
    assert torch.equal(found.codes, wanted.codes)


@pytest.mark.parametrize("type_", TYPES, ids=str)
def test_scales_are_those_of_the_formula(type_: IntegerType) -> None:
    before, now = some_weight(7, 33), some_weight(7, 40)[:, 7:] * torch.linspace(0.2, 5, 7)[:, None]
    found = following(before, type_).params(now, torch.zeros(7)).scale
    chosen = weight_params(before, 0, type_, clip=WeightClip.MSE).scale.double()
    formula = [
        float(scale) * sum(map(abs, new)) / sum(map(abs, old))
        for scale, new, old in zip(chosen, now.double().tolist(), before.double().tolist(), strict=True)
    ]
    assert torch.allclose(found.double(), torch.tensor(formula, dtype=torch.float64), rtol=2**-23, atol=0)


def test_the_scale_of_a_channel_is_its_own() -> None:
    weight = some_weight(5, 12)
    rounding, moved = following(weight, INT8_NARROW), weight.clone()
    moved[3] *= 2
    ratio = rounding.params(moved, torch.zeros(5)).scale / rounding.params(weight, torch.zeros(5)).scale
    assert ratio.tolist() == [1, 1, 1, 2, 1]
    codes = rounding.rounded(moved, torch.zeros(5)).codes
    assert torch.equal(codes, rounding.rounded(weight, torch.zeros(5)).codes)


def test_scales_that_do_not_follow_stay() -> None:
    weight = some_weight(5, 12)
    known = calibrated(weight, INT8_NARROW)
    rounding = WeightRounding.of(known, weight, input_scale=INPUT_SCALE, follows=False)
    assert rounding.params(3 * weight, torch.zeros(5)) is known.params


def test_no_gradient_goes_through_a_scale() -> None:
    weight = some_weight(4, 6).requires_grad_()
    rounding = following(weight, INT8_NARROW)
    assert not rounding.rounded(weight, torch.zeros(4, requires_grad=True)).values.requires_grad


def test_a_channel_of_zeros_keeps_its_scale_until_it_lives() -> None:
    weight = some_weight(4, 6)
    weight[1] = 0
    rounding = following(weight, INT8_NARROW)
    known = rounding.calibrated.params.scale
    weight[1] = 0.25
    assert rounding.params(weight, torch.zeros(4)).scale[1] == known[1]
    assert rounding.params(torch.zeros(4, 6), torch.zeros(4)).scale.tolist() == known.tolist()


def test_a_bias_fits_int32_beside_weights_that_vanish() -> None:
    weight = some_weight(3, 6)
    rounding, bias = following(weight, INT8_NARROW), torch.tensor([2.0, -2.0, 0.0])
    scale = rounding.params(1e-12 * weight, bias).scale
    assert bool((bias[:2].abs().double() / (scale[:2].double() * INPUT_SCALE) <= 2**30).all())
    assert float(scale[2]) < 1e-12


def test_a_weight_that_is_no_number_is_named() -> None:
    weight = some_weight(3, 6)
    rounding = following(weight, INT8_NARROW)
    with pytest.raises(UsageError, match="scale"):
        rounding.params(weight * float("nan"), torch.zeros(3))


def test_distances_worked_out_by_hand() -> None:
    params = weight_params(torch.tensor([[4.0, -8.0, 2.0]]), 0, IntegerType(3, signed=True), clip=WeightClip.MSE)
    assert params.scale.tolist() == [2.0]
    found = distance_to_border(torch.tensor([[4.0, 3.0, 3.5, -1.0, -0.5]]), params)
    assert found.tolist() == [[0.5, 0.0, 0.25, 0.0, 0.25]]
