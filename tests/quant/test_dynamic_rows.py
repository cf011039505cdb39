"""Codes found row by row: where they end, what they leave, and what has none."""

from __future__ import annotations

import pytest
import torch

from normfuse.errors import UsageError
from normfuse.quant import DynamicParams, round_rows
from normfuse.testing import seeded


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("shape", "size"), [((1, 16), 16), ((7, 3, 96), 32), ((129, 48), 16), ((256,), 128)])
def test_every_group_of_every_row_has_its_own_scale(shape: tuple[int, ...], size: int, dtype: torch.dtype) -> None:
    x = torch.randn(shape, generator=seeded(1), dtype=dtype) * torch.logspace(-3, 3, shape[-1], dtype=dtype)
    found = round_rows(x, DynamicParams(size=size))
    assert found.shape == x.shape
    assert found.dtype == dtype
    groups, rounded = x.reshape(-1, size), found.reshape(-1, size)
    largest = groups.abs().amax(1, keepdim=True)
    assert ((rounded - groups).abs() <= 0.5001 * largest / 127).all()
    assert not torch.equal(rounded, groups)
    torch.testing.assert_close(rounded.abs().amax(1, keepdim=True), largest, rtol=2.0**-22, atol=0)
    for row, group in zip(rounded, groups, strict=True):
        alone = round_rows(group, DynamicParams(size=size))
        assert torch.equal(row, alone)


def test_codes_are_whole_and_symmetric_and_half_goes_to_even() -> None:
    x = torch.tensor([127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -126.5, -127.0])
    expected = torch.tensor([127.0, 0.0, 2.0, 2.0, 0.0, -2.0, -126.0, -127.0])
    assert torch.equal(round_rows(x, DynamicParams(size=8)), expected)


def test_the_inverse_is_rounded_once() -> None:
    # 127 / largest differs from 1 / (largest / 127) in its last bit here, which is what decides about this code.
    largest = torch.rand(4096, generator=seeded(3)) * 10 + 0.1
    x = torch.stack([largest, (largest / 127) * 40.5], dim=1)
    codes = (round_rows(x, DynamicParams(size=2))[:, 1] / (largest / 127)).round()
    wanted = torch.round(x[:, 1] * (torch.full_like(largest, 127.0) / largest))
    assert torch.equal(codes, wanted)
    assert not torch.equal(codes, torch.round(x[:, 1] / (largest / 127))), "or this shows nothing"


@pytest.mark.parametrize("value", [0.0, 1e-40, 1e-38, -1e-37])
def test_what_has_no_inverse_becomes_zero(value: float) -> None:
    found = round_rows(torch.full((3, 32), value), DynamicParams(size=16))
    assert torch.equal(found, torch.zeros(3, 32))


def test_a_constant_group_is_kept() -> None:
    x = torch.tensor([[3.7] * 16 + [-1e-30] * 16])
    torch.testing.assert_close(round_rows(x, DynamicParams(size=16)), x, rtol=2.0**-22, atol=0)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(UsageError, match="groups of 32"):
        round_rows(torch.ones(2, 48), DynamicParams(size=32))
    with pytest.raises(UsageError, match="groups of 0"):
        DynamicParams(size=0)
