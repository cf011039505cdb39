from __future__ import annotations

import pytest
import torch
from correlated_layer import correlated_layer
from hypothesis import given
from hypothesis import strategies as st

from normfuse.errors import UsageError
from normfuse.quant import (
    INT4,
    InputMoments,
    IntegerType,
    PerChannel,
    PerGroup,
    PerTensor,
    added_error,
    quantize,
    refit_scale,
    round_by_gptq,
    symmetric,
    weight_params,
)

INT2 = IntegerType(2, signed=True)
INT3 = IntegerType(3, signed=True)
UINT3 = IntegerType(3, signed=False)


@given(st.integers(0, 10_000), st.sampled_from([INT2, INT3, INT4]), st.sampled_from([None, 3]))
def test_the_added_error_is_that_of_the_outputs(seed: int, kind: IntegerType, group: int | None) -> None:
    layer = correlated_layer(seed, drift=0.5)
    params = weight_params(layer.weight, 0, kind, group=group)
    codes = quantize(layer.weight, params)
    unrounded = ((layer.x.double() - layer.x_float.double()) @ layer.weight.double().mT).square().sum(dim=0)
    torch.testing.assert_close(
        added_error(layer.weight, codes, params, layer.moments), layer.squared_error(codes, params) - unrounded
    )


@given(st.integers(0, 10_000), st.sampled_from([INT2, INT3, INT4, UINT3]))
def test_the_refitted_scale_is_the_projection(seed: int, kind: IntegerType) -> None:
    layer = correlated_layer(seed)
    params = weight_params(layer.weight, 0, kind, is_symmetric=kind.signed)
    codes = quantize(layer.weight, params)
    found = refit_scale(layer.weight, codes, params, layer.moments)
    outputs = layer.x.double() @ (codes.int() - params.zero_point[:, None]).double().mT
    wanted = layer.x_float.double() @ layer.weight.double().mT
    best = (outputs * wanted).sum(dim=0) / outputs.square().sum(dim=0)
    expected = torch.where(best > 0, best.float(), params.scale)
    torch.testing.assert_close(found.scale, expected, atol=0, rtol=2.0**-20)


@given(st.integers(0, 10_000), st.sampled_from([1, 4, 5, 13, 20]), st.booleans())
def test_refitted_groups_are_never_worse(seed: int, group: int, is_symmetric: bool) -> None:
    layer = correlated_layer(seed)
    params = weight_params(layer.weight, 0, INT2, group=group, is_symmetric=is_symmetric)
    codes = quantize(layer.weight, params)
    found = refit_scale(layer.weight, codes, params, layer.moments)
    before, after = (added_error(layer.weight, codes, each, layer.moments) for each in (params, found))
    # Float32 values move the error by 2 ** -24 of the largest outputs.
    slack = 2.0**-20 * float(layer.squared_error(torch.zeros_like(codes), params).max() + before.abs().max())
    assert bool((after <= before + slack).all())


@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel(1), PerGroup(0, 2)])
def test_scales_that_outputs_share_are_not_refitted(granularity: PerTensor | PerChannel | PerGroup) -> None:
    weight = torch.ones(4, 4)
    shape = {PerTensor(): [], PerChannel(1): [4], PerGroup(0, 2): [2, 4]}[granularity]
    params = symmetric(torch.ones(shape), INT4, granularity)
    with pytest.raises(UsageError, match="share"):
        refit_scale(weight, quantize(weight, params), params, InputMoments(4))
    assert round_by_gptq(weight, params, InputMoments(4)).shape == (4, 4)
