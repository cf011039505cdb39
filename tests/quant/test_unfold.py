from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import nn

from normfuse.quant import unfold_rows


@dataclass(frozen=True)
class Case:
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int = 1


CASES = {
    "1d": Case((3,), (2,), (1,), (2,)),
    "pointwise": Case((1, 1), (1, 1), (0, 0), (1, 1)),
    "2d": Case((3, 2), (2, 1), (2, 1), (1, 3)),
    "grouped": Case((2, 3), (1, 2), (0, 2), (2, 1), groups=2),
    "depthwise": Case((3, 3), (1, 1), (1, 1), (1, 1), groups=6),
    "patches": Case((4, 5), (4, 5), (0, 0), (1, 1)),
    "3d": Case((2, 3, 1), (1, 2, 1), (1, 0, 2), (2, 1, 1), groups=3),
}


@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_rows_times_weights_are_the_convolution(case: Case) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 6, *(9, 11, 7)[: len(case.kernel)], generator=generator, dtype=torch.float64)
    layer = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[len(case.kernel) - 1](
        6,
        12,
        case.kernel,  # type: ignore[arg-type]
        stride=case.stride,  # type: ignore[arg-type]
        padding=case.padding,  # type: ignore[arg-type]
        dilation=case.dilation,  # type: ignore[arg-type]
        groups=case.groups,
        bias=False,
        dtype=torch.float64,
    )
    with torch.no_grad():
        expected = layer(x)
    rows = unfold_rows(
        x,
        case.kernel,
        stride=case.stride,
        padding=case.padding,
        dilation=case.dilation,
        groups=case.groups,
    )
    weight = layer.weight.detach().reshape(case.groups, 12 // case.groups, -1)
    found = (rows @ weight.mT).movedim(1, 2).reshape(12, 2, -1).movedim(1, 0).reshape(expected.shape)
    torch.testing.assert_close(found, expected)
