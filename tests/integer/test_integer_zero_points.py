"""Codes whose zero point is not 0, and tensors whose step says nothing: where neither may be forgotten."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from integer_module import hold_all, lower, module, normal
from torch import Tensor, nn
from torch.nn import functional as F

POOLED: dict[str, Any] = {
    "RMS norm": lambda m, x: m.norm(x),
    "a product with itself": lambda m, x: x @ x.transpose(1, 2),
    "a product and an output": lambda m, x: (x, x.transpose(1, 2) @ x),
    "attention": lambda m, x: F.scaled_dot_product_attention(x, x, x),
    "attention that is spelled out": lambda m, x: (x @ x.transpose(1, 2)).softmax(-1) @ x,
    "an elementwise product": lambda m, x: x * x + x.mean(1, keepdim=True),
    "a linear map and a sum": lambda m, x: m.map(x) + x,
    "a table": lambda m, x: F.gelu(x),
    "a concatenation": lambda m, x: torch.cat([x, m.map(x)], dim=1),
    "bounds": lambda m, x: F.relu6(x),
    "upsampling": lambda m, x: F.interpolate(x[:, None], scale_factor=2, mode="bilinear"),
    "padding": lambda m, x: F.pad(x, (1, 2)),
    "a class map": lambda m, x: x.argmax(-1),
}


@pytest.mark.parametrize("reader", POOLED.values(), ids=POOLED)
def test_readers_of_what_is_pooled_by_the_largest(reader: Any) -> None:
    """No runtime pools 16 bits, so 8 bits are pooled, whose zero point is at the bottom behind a ReLU."""

    def forward(m: Any, x: Tensor) -> Any:
        return reader(m, F.max_pool2d(m.first(x).relu()[:, None], 3, 1, 1)[:, 0])

    layers = {"first": nn.Linear(7, 5), "norm": nn.RMSNorm(5), "map": nn.Linear(5, 5)}
    hold_all(module(forward, **layers), (3, 7), is_written=False)


ALWAYS_ZERO: dict[str, Any] = {
    "an affine": lambda m, x: 1.7 * x - 0.2,
    "a scale and a shift per channel": lambda m, x: torch.tanh(x * m.scale + m.shift),
    "a linear map": lambda m, x: m.map(x),
    "a layer norm": lambda m, x: m.norm(x),
    "a sum": lambda m, x: x + m.shift,
}


@pytest.mark.parametrize("reader", ALWAYS_ZERO.values(), ids=ALWAYS_ZERO)
def test_what_is_added_to_what_is_always_zero(reader: Any) -> None:
    """Its range gives no scale, and a constant that is held in steps of an arbitrary one would be lost.

    A constant is right to a step of the eight bits that may read it.
    """

    def forward(m: Any, x: Tensor) -> Any:
        return reader(m, (m.first(x) - 10).relu())

    vectors = {"scale": torch.zeros(5), "shift": torch.zeros(5)}
    layers = {"first": nn.Linear(7, 5), "map": nn.Linear(5, 4), "norm": nn.LayerNorm(5)}
    lowered, inputs = lower(module(forward, **layers, **vectors), (3, 7), is_written=False), normal(5, 3, 7, seed=9)
    (found,), (wanted,) = lowered.graph.run(inputs), lowered.plan.graph.run(inputs)
    assert (found - wanted).abs().max() <= wanted.abs().max() / 127
