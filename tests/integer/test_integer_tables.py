"""Functions of one number: 256 entries, exact whatever the function."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from integer_module import hold, lower, module, normal
from torch import Tensor, nn
from torch.nn import functional as F

FUNCTIONS: list[Any] = [
    F.gelu,
    lambda x: F.gelu(x, approximate="tanh"),
    F.silu,
    torch.tanh,
    torch.sigmoid,
    F.hardswish,
    F.hardsigmoid,
    lambda x: F.leaky_relu(x, 0.3),
    lambda x: F.elu(x, alpha=0.7),
    F.mish,
    lambda x: F.softplus(x, beta=2.0, threshold=3.0),
    torch.erf,
    torch.exp,
]

MADE = ("x", "add", "linear")
"""What else has codes."""

HALF = 0.5 + 1e-6
"""Entries are rounded once, from float64."""


@pytest.mark.slow
def test_a_table_has_the_nearest_codes() -> None:
    """Of 8 bits in front of a linear map, of 16 at the end."""

    def forward(m: Any, x: Tensor) -> tuple[Tensor, ...]:
        wide = [function(x) for function in FUNCTIONS]
        return *wide, *(m.map(function(x + 0.5)) for function in FUNCTIONS)

    lowered, inputs = lower(module(forward, map=nn.Linear(7, 5)), (3, 7)), 2 * normal(5, 3, 7, seed=9)
    assert lowered.operators.count("int_table") == 2 * len(FUNCTIONS)
    hold(lowered, inputs)
    tables = {name: far for name, (far, _) in lowered.distances(inputs).items() if not name.startswith(MADE)}
    assert len(tables) == 2 * len(FUNCTIONS)
    assert max(tables.values()) <= HALF, tables
