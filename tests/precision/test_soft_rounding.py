"""Soft rounding starts as the float weight, decides between two codes, and lowers a block's error."""

from __future__ import annotations

import pytest
import torch

from normfuse.precision.soft_rounding import SoftlyRounded
from normfuse.quant import INT4, RoundedWeight, WeightClip, quantize, round_to_nearest, weight_params
from normfuse.testing import seeded


def weight() -> torch.Tensor:
    return torch.randn(6, 20, generator=seeded(3))


def started(x: torch.Tensor, bias: torch.Tensor | None = None) -> SoftlyRounded:
    params = weight_params(x, 0, INT4, clip=WeightClip.MAXIMUM)
    return SoftlyRounded(RoundedWeight(codes=quantize(x, params), params=params, bias=bias), x)


def test_it_starts_as_the_float_weight_and_rounds_to_nearest() -> None:
    x = weight()
    soft = started(x, torch.ones(6))
    assert torch.allclose(soft.values(), x, atol=1e-5)
    nearest = round_to_nearest(x, None, INT4, input_scale=None)
    plain = quantize(x, weight_params(x, 0, INT4, clip=WeightClip.MAXIMUM))
    assert nearest.codes.dtype == plain.dtype
    assert torch.equal(soft.rounded(None).codes, plain)
    bias = soft.rounded(0.5).bias
    assert bias is not None
    assert torch.equal(bias, torch.ones(6))


def test_what_is_far_from_a_code_is_undecided_until_it_moved() -> None:
    x = weight()
    soft = started(x)
    assert float(soft.undecided(2.0).detach()) > 0.3
    with torch.no_grad():
        soft.offset.copy_(torch.where(torch.rand(x.shape, generator=seeded(1)) < 0.5, -9.0, 9.0))
    assert float(soft.undecided(2.0).detach()) == pytest.approx(0, abs=1e-6)
    found = soft.rounded(None)
    assert torch.allclose(found.values, soft.values(), atol=1e-5)
    steps = x / found.params.scale[:, None]
    assert set((found.codes - steps.floor().clamp(-8, 6)).unique().tolist()) == {0, 1}


def test_the_penalty_alone_decides_for_the_nearer_code() -> None:
    x = weight()
    soft = started(x)
    optimizer = torch.optim.Adam([soft.offset], lr=0.1)
    for _ in range(200):
        optimizer.zero_grad()
        soft.undecided(2.0).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    assert float(soft.undecided(2.0).detach()) < 0.01
    assert torch.equal(soft.rounded(None).codes, quantize(x, weight_params(x, 0, INT4, clip=WeightClip.MAXIMUM)))
