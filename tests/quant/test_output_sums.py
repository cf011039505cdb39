"""The affine of every output that is nearest to the float one, from sums alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from normfuse.errors import UsageError
from normfuse.quant import OutputSums
from normfuse.testing import seeded


def rows(count: int, outputs: int, seed: int) -> tuple[Tensor, Tensor]:
    quantized = torch.randn(count, outputs, generator=seeded(seed)) * 3 + 1
    return quantized, 0.8 * quantized - 2 + 0.3 * torch.randn(count, outputs, generator=seeded(seed + 1))


@given(st.integers(0, 50), st.integers(1, 5), st.integers(3, 40))
def test_it_is_the_solution_of_least_squares(seed: int, outputs: int, count: int) -> None:
    quantized, exact = rows(count, outputs, seed)
    sums = OutputSums(outputs)
    for q, f in zip(quantized.split(7), exact.split(7), strict=True):
        sums.update(q[None], f[None])
    factor, offset = sums.regression(through_zero=False)
    alone, none = sums.regression(through_zero=True)
    assert not none.any()
    for output in range(outputs):
        q, f = quantized[:, output].double(), exact[:, output].double()
        found = torch.linalg.lstsq(torch.stack([q, torch.ones_like(q)], dim=1), f).solution
        through = float((q * f).sum() / q.square().sum())
        if found[0] > 0:
            assert [float(factor[output]), float(offset[output])] == pytest.approx(found.tolist(), rel=1e-8, abs=1e-8)
        if through > 0:
            assert float(alone[output]) == pytest.approx(through, rel=1e-10)


def test_what_is_constant_or_against_its_target_keeps_its_scale_and_gets_the_mean() -> None:
    quantized = torch.tensor([[2.0, 1.0, 0.1], [2.0, 2.0, 0.1], [2.0, 3.0, 0.1]])
    exact = torch.tensor([[5.0, 3.0, 1.0], [6.0, 2.0, 2.0], [7.0, 1.0, 3.0]])
    sums = OutputSums(3)
    sums.update(quantized, exact)
    factor, offset = sums.regression(through_zero=False)
    assert factor.tolist() == [1, 1, 1]
    assert offset.tolist() == pytest.approx([4.0, 0.0, 1.9])


def test_nothing_seen_changes_nothing() -> None:
    factor, offset = OutputSums(2).regression(through_zero=False)
    assert factor.tolist() == [1, 1]
    assert offset.tolist() == [0, 0]


def test_other_shapes_are_refused() -> None:
    with pytest.raises(UsageError, match="outputs of"):
        OutputSums(2).update(torch.zeros(3, 2), torch.zeros(4, 2))
    with pytest.raises(UsageError, match="outputs of"):
        OutputSums(2).update(torch.zeros(3, 3), torch.zeros(3, 3))
