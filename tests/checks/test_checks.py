"""Checks that must be able to fail: broken models, broken engines, nothing compared."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from normfuse.checks import Check, check_codes, check_export, check_fold
from normfuse.export.onnx import export_onnx
from normfuse.graph import Graph, capture
from normfuse.graph.edit import converted

SAMPLES = [[torch.randn(1, 5, generator=torch.Generator().manual_seed(seed))] for seed in range(3)]


class Head(nn.Module):
    def __init__(self, bias: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 1, 15).reshape(3, 5))
        self.bias = nn.Parameter(torch.tensor([0.5, bias, -0.5]))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight, self.bias)


def linear(bias: float = 0.0) -> Graph:
    return capture(Head(bias).eval(), [torch.zeros(2, 5)])


def fold_check(broken: Graph, folder: Path, samples: list[list[Tensor]]) -> Check:
    return check_fold(linear(), converted(broken, torch.float64), samples)


def export_check(broken: Graph, folder: Path, samples: list[list[Tensor]]) -> Check:
    export_onnx(broken, folder / "model.onnx")
    return check_export(linear(), folder / "model.onnx", samples, threads=1)


def codes_check(broken: Graph, folder: Path, samples: list[list[Tensor]]) -> Check:
    export_onnx(broken, folder / "model.onnx")
    return check_codes(linear(), folder / "model.onnx", samples, threads=1, session_config={})[-1]


CheckOf = Callable[[Graph, Path, list[list[Tensor]]], Check]
EVERY = pytest.mark.parametrize("check", [fold_check, export_check, codes_check])


@EVERY
def test_what_is_the_same_holds(check: CheckOf, tmp_path: Path) -> None:
    found = check(linear(), tmp_path, SAMPLES)
    assert found.holds, found


@EVERY
@pytest.mark.parametrize("bias", [math.nan, math.inf, 3.0])
def test_outputs_that_differ_or_are_not_finite_fail(check: CheckOf, tmp_path: Path, bias: float) -> None:
    found = check(linear(bias), tmp_path, SAMPLES)
    assert not found.holds, found
