"""Logarithmic codes stand for powers, values get the nearest of them, and the scale is the best of those tried."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from normfuse.errors import UsageError
from normfuse.kernels import reference
from normfuse.kernels.ops import DEQUANTIZE_LOGARITHM, QUANTIZE_LOGARITHM
from normfuse.quant import INT4, UINT4, IntegerType, LogarithmicParams, PerChannel, logarithmic_params, snap
from normfuse.quant.logarithm import SCALES
from normfuse.testing import seeded

UINT3 = IntegerType(3, signed=False)


def probabilities(*shape: int) -> torch.Tensor:
    return (3 * torch.randn(shape, generator=seeded(4))).softmax(-1)


def params(**changes: Any) -> LogarithmicParams:
    given: dict[str, Any] = {"scale": torch.tensor(0.5), "per_octave": 1, "type": UINT3, "top_is_zero": True}
    return LogarithmicParams(**(given | changes))


def test_codes_count_octaves_and_half_octaves() -> None:
    assert params().levels.tolist() == [1, 1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64, 0]
    halves = params(per_octave=2, top_is_zero=False).levels
    assert torch.allclose(halves, 0.5 ** (torch.arange(8) / 2))
    assert halves[-1] > 0.08


def test_a_value_gets_the_nearest_value_and_not_the_nearest_logarithm() -> None:
    x = torch.tensor([9.0, 0.5, 0.376, 0.374, 0.36, 0.0, -1.0])  # 0.36 is nearer to 0.5 in logarithms
    assert snap(x, params()).tolist() == [0.5, 0.5, 0.5, 0.25, 0.25, 0.0, 0.0]
    assert float(snap(torch.tensor(0.0), params(top_is_zero=False))) == 0.5 / 128


@pytest.mark.parametrize("per_octave", [1, 2])
@pytest.mark.parametrize("top_is_zero", [True, False])
def test_no_level_is_nearer(per_octave: int, top_is_zero: bool) -> None:
    x, found = probabilities(5, 40), params(per_octave=per_octave, top_is_zero=top_is_zero)
    nearest = (x[..., None] - found.levels * found.scale).abs().amin(-1)
    assert torch.allclose((snap(x, found) - x).abs(), nearest, atol=1e-7)


@pytest.mark.parametrize("per_octave", [1, 2])
def test_the_scale_has_the_least_error_of_all_tried(per_octave: int) -> None:
    x = 0.3 * probabilities(64, 17)
    found = logarithmic_params(x, UINT3, per_octave=per_octave)
    tried = [
        params(scale=x.max() * fraction, per_octave=per_octave, top_is_zero=top)
        for fraction in SCALES
        for top in (True, False)
    ]
    errors = [float((snap(x, each) - x).square().sum()) for each in tried]
    assert float((snap(x, found) - x).square().sum()) == pytest.approx(min(errors), rel=1e-5)
    assert min(errors) < 0.95 * errors[0]


def test_channels_have_scales_of_their_own() -> None:
    x = torch.stack([probabilities(16, 9), 0.01 * probabilities(16, 9)], dim=1)  # [16, channels, 9]
    found = logarithmic_params(x, UINT3, per_octave=2, granularity=PerChannel(1))
    assert found.scale.shape == (2,)
    assert found.scale[0] > 50 * found.scale[1]
    one = logarithmic_params(x, UINT3, per_octave=2)
    assert (snap(x, found) - x)[:, 1].square().sum() < 0.1 * (snap(x, one) - x)[:, 1].square().sum()


def test_nothing_but_zeros_stays_zero() -> None:
    zeros = torch.zeros(3, 4)
    assert torch.equal(snap(zeros, logarithmic_params(zeros, UINT4, per_octave=1)), zeros)


@pytest.mark.parametrize("changes", [{"type": INT4}, {"per_octave": 0}, {"scale": torch.tensor([0.5])}])
@pytest.mark.parametrize("scale", [None, torch.tensor(0.0), torch.tensor(torch.inf)])
def test_impossible_ones_are_refused(changes: dict[str, Any], scale: torch.Tensor | None) -> None:
    with pytest.raises(UsageError):
        params(**(changes if scale is None else {"scale": scale}))


@pytest.mark.parametrize("axis", [-1, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_operators_are_the_reference_and_satisfy_torch(axis: int, dtype: torch.dtype) -> None:
    x = probabilities(3, 5, 7).to(dtype)
    scale = (torch.rand([] if axis < 0 else [5], generator=seeded(1)) + 0.1).to(dtype)
    grid = (axis, 8, 2, True)
    codes = QUANTIZE_LOGARITHM(x, scale, *grid)
    assert codes.dtype == torch.uint8
    assert torch.equal(codes, reference.quantize_logarithm(x, scale, *grid))
    torch.library.opcheck(QUANTIZE_LOGARITHM, (x, scale, *grid))
    torch.library.opcheck(DEQUANTIZE_LOGARITHM, (codes, scale, *grid))
    if dtype is torch.float32:
        on = PerChannel(axis) if axis > 0 else params().granularity
        found = params(scale=scale, per_octave=2, granularity=on)
        assert torch.equal(DEQUANTIZE_LOGARITHM(codes, scale, *grid), snap(x, found))
