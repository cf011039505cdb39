from __future__ import annotations

import pytest
import torch
from torch import Tensor

from normfuse.errors import UsageError
from normfuse.quant import (
    INT4,
    INT8,
    UINT4,
    UINT8,
    IntegerType,
    PerChannel,
    PerGroup,
    WeightClip,
    quantize,
    quantize_dequantize,
    scale_for_bias,
    symmetric,
    weight_params,
)
from normfuse.quant.float_type import FLOAT8
from normfuse.quant.weights import round_to_nearest


def _weight(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(11)) ** 3


@pytest.mark.parametrize(("shape", "axis"), [((5, 7), 0), ((5, 7), 1), ((3, 4, 2, 6), 0), ((3, 4, 2, 6), 1)])
def test_the_largest_weight_of_a_channel_gets_the_largest_code(shape: tuple[int, ...], axis: int) -> None:
    weight = _weight(*shape)
    params = weight_params(weight, axis, INT8)
    codes = quantize(weight, params).movedim(axis, 0).flatten(1).int()
    assert params.granularity == PerChannel(axis)
    assert codes.abs().amax(dim=1).tolist() == [127] * shape[axis]


@pytest.mark.parametrize("kind", [INT8, INT4, IntegerType(3, signed=True)], ids=str)
def test_the_search_is_never_worse_in_any_channel_and_better_at_low_widths(kind: IntegerType) -> None:
    weight = _weight(9, 301)
    error = {
        clip: (quantize_dequantize(weight, weight_params(weight, 0, kind, clip=clip)) - weight).square().sum(dim=1)
        for clip in WeightClip
    }
    assert bool((error[WeightClip.MSE] <= error[WeightClip.MAXIMUM]).all())
    if kind.bits < 8:
        assert float(error[WeightClip.MSE].sum()) < 0.8 * float(error[WeightClip.MAXIMUM].sum())


def test_a_dead_channel_stays_zero_with_an_ordinary_scale() -> None:
    weight = _weight(4, 6)
    weight[2] = 0.0
    params = weight_params(weight, 0, INT8, clip=WeightClip.MSE)
    assert params.scale[2] == params.scale.max()
    assert quantize(weight, params)[2].tolist() == [0] * 6


def test_a_bias_always_fits_int32_beside_tiny_weights() -> None:
    params = symmetric(torch.tensor([1e-30, 1.0]), INT8, PerChannel(0))
    bias, input_scale = torch.tensor([-3.0, 3.0]), 0.01
    raised = scale_for_bias(params, input_scale=input_scale, bias=bias)
    codes = bias.double() / (raised.scale.double() * input_scale)
    assert bool((codes.abs() <= 2**30).all())
    assert codes[0].item() == pytest.approx(-(2.0**30), rel=1e-6)  # no coarser than needed
    assert raised.scale[1] == params.scale[1]


def test_the_product_of_scales_never_becomes_subnormal() -> None:
    params = symmetric(torch.tensor([1e-36]), INT8, PerChannel(0))
    raised = scale_for_bias(params, input_scale=1e-4, bias=torch.zeros(1))
    assert (raised.scale.double() * 1e-4).item() >= 2.0**-126


WIDTHS = [IntegerType(bits, signed=signed) for bits in range(2, 9) for signed in (True, False)]


@pytest.mark.parametrize("clip", WeightClip)
@pytest.mark.parametrize("kind", WIDTHS, ids=str)
def test_groups_get_the_scale_they_would_get_alone(kind: IntegerType, clip: WeightClip) -> None:
    weight = _weight(3, 11)
    for is_symmetric in {False, kind.signed}:
        params = weight_params(weight, 0, kind, clip=clip, group=4, is_symmetric=is_symmetric)
        assert (params.granularity, params.scale.shape) == (PerGroup(1, 4), (3, 3))
        for group in range(3):
            alone = weight_params(weight[:, 4 * group : 4 * group + 4], 0, kind, clip=clip, is_symmetric=is_symmetric)
            assert torch.equal(params.scale[:, group], alone.scale)
            assert torch.equal(params.zero_point[:, group], alone.zero_point)
        assert not (is_symmetric and bool(params.zero_point.any()))


def test_groups_lie_on_the_axis_of_the_inputs() -> None:
    weight = _weight(6, 4, 3)
    by_row, by_column = weight_params(weight, 0, INT4, group=2), weight_params(weight, 1, INT4, group=2)
    assert by_row.scale.shape == (6, 2, 3)
    assert by_column.scale.shape == (3, 4, 3)
    assert by_row.scale[5, 1, 2].item() == pytest.approx(weight[5, 2:4, 2].abs().max().item() / 7)
    assert by_column.scale[1, 3, 2].item() == pytest.approx(weight[2:4, 3, 2].abs().max().item() / 7)


@pytest.mark.parametrize("group", [None, 16])
@pytest.mark.parametrize("kind", [UINT8, UINT4, IntegerType(2, signed=False), IntegerType(3, signed=True)], ids=str)
def test_the_search_for_both_ends_is_never_worse(kind: IntegerType, group: int | None) -> None:
    weight = _weight(9, 96) + 0.5

    def error(clip: WeightClip) -> Tensor:
        params = weight_params(weight, 0, kind, clip=clip, group=group, is_symmetric=False)
        return (quantize_dequantize(weight, params) - weight).square().reshape(9, -1, group or 96).sum(dim=2)

    searched, full = error(WeightClip.MSE), error(WeightClip.MAXIMUM)
    assert bool((searched <= full * (1 + 96 * 2.0**-24)).all())  # sums of float32 squares in another order
    assert kind.bits > 3 or float(searched.sum()) < 0.95 * float(full.sum())


def test_weights_on_an_asymmetric_grid_are_exact() -> None:
    # Three steps of 0.5 from -0.5 to 1.0: the full range is the whole grid.
    weight = torch.tensor([[-0.5, 0.0, 0.5, 1.0], [0.0, 0.0, 0.0, 0.0], [3.0, 3.0, 3.0, 3.0]])
    for clip in WeightClip:
        params = weight_params(weight, 0, IntegerType(2, signed=False), clip=clip, is_symmetric=False)
        assert torch.equal(quantize_dequantize(weight, params), weight)


def test_groups_of_a_vector_are_refused() -> None:
    with pytest.raises(UsageError):
        weight_params(torch.ones(4), 0, INT4, group=2)


@pytest.mark.parametrize(("axis", "kind"), [(2, INT8), (-1, INT8), (0, UINT8)])
def test_what_does_not_fit_is_refused(axis: int, kind: IntegerType) -> None:
    with pytest.raises(UsageError):
        weight_params(_weight(3, 2), axis, kind)


def test_weights_that_are_not_finite_are_refused() -> None:
    with pytest.raises(UsageError, match="finite"):
        weight_params(torch.tensor([[1.0, float("nan")]]), 0, INT8)


@pytest.mark.parametrize("clip", list(WeightClip))
@pytest.mark.parametrize(("shape", "axis"), [((5, 7), 0), ((5, 7), 1), ((3, 4, 2, 6), 0)])
@pytest.mark.parametrize("is_symmetric", [True, False])
def test_8_bit_floats_reach_the_largest_weight_of_a_channel(
    shape: tuple[int, ...], axis: int, clip: WeightClip, is_symmetric: bool
) -> None:
    weight = _weight(*shape)
    params = weight_params(weight, axis, FLOAT8, clip=clip, is_symmetric=is_symmetric)
    rows = weight.movedim(axis, 0).flatten(1)
    assert params.granularity == PerChannel(axis)
    assert params.scale.tolist() == pytest.approx((rows.abs().amax(dim=1) / 448).tolist(), rel=1e-6)
    assert not params.zero_point.any()
    codes = quantize(weight, params).movedim(axis, 0).flatten(1).float()
    assert codes.abs().amax(dim=1).tolist() == [448.0] * shape[axis]


def test_a_large_8_bit_float_costs_the_small_ones_nothing() -> None:
    weight = _weight(4, 33) + 1
    weight[:, 5] = 300.0
    rounded = round_to_nearest(weight, torch.ones(4), FLOAT8, input_scale=None)
    assert rounded.codes.dtype is torch.float8_e4m3fn
    normal = weight.abs() >= rounded.params.scale[:, None] * 2.0**-6
    assert bool(((rounded.values - weight).abs() <= weight.abs() * 2.0**-4)[normal].all())


def test_groups_of_8_bit_floats_have_their_own_scales() -> None:
    weight = _weight(3, 8)
    params = weight_params(weight, 0, FLOAT8, group=4, clip=WeightClip.MSE)
    largest = weight.reshape(3, 2, 4).abs().amax(dim=2) / 448
    assert params.granularity == PerGroup(1, 4)
    assert torch.allclose(params.scale, largest, rtol=1e-6, atol=0)
