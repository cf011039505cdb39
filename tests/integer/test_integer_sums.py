"""Sums, differences, products, means and concatenation of activations and constants."""

from __future__ import annotations

from typing import Any

import torch
from integer_module import hold, hold_all, module, normal
from torch import Tensor, nn
from torch.nn import functional as F


def test_sums_of_views() -> None:
    def forward(m: Any, x: Tensor) -> tuple[Tensor, ...]:
        one, two = m.one(x), m.two(x)
        flat = one.reshape(-1, 15)[:, 2:9] + two.flatten(1)[:, :7]
        permuted = one.permute(0, 2, 1) + two.permute(0, 2, 1)[:, :, :1]
        of_three = one.flip(1) + two[:, :1].tanh() + x[:, :, :5]
        return flat, permuted, of_three, x + x.flip(1)

    lowered = hold_all(module(forward, one=nn.Linear(7, 5), two=nn.Linear(7, 5)), (3, 7))
    assert lowered.operators.count("int_add") == 5
    hold(lowered, 3 * normal(4, 3, 7))


def test_constants() -> None:
    def forward(m: Any, x: Tensor) -> tuple[Tensor, ...]:
        shifted = x + m.table, x - m.table, m.table - x, x * m.table
        numbers = m.map(x + 1.25), m.map(-2.5 * x).tanh() * 1.5, 1 - x
        return *shifted, *numbers, (x.tanh() * 3 - m.table[0]) * m.table[0]

    lowered = hold_all(module(forward, table=torch.zeros(3, 7), map=nn.Linear(7, 5)), (3, 7))
    assert lowered.operators.count("int_multiply") == 1
    hold(lowered, 3 * normal(4, 3, 7))


def test_constants_of_zero() -> None:
    def forward(m: Any, x: Tensor) -> tuple[Tensor, ...]:
        return x + m.table, m.table - x, x * m.table, x * m.table + m.map(x)

    network: Any = module(forward, table=torch.zeros(3, 7), map=nn.Linear(7, 7))
    with torch.no_grad():
        network.table.zero_()
    hold_all(network, (3, 7))


def test_differences() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.one(x).relu() - m.two(x).tanh()  # type: ignore[no-any-return]

    assert (
        hold_all(module(forward, one=nn.Linear(7, 5), two=nn.Linear(7, 5)), (3, 7), is_written=False).operators[-1]
        == "int_add"
    )


def test_a_difference_that_cancels() -> None:
    """The operands' steps are some thousand of the difference's."""
    lowered = hold_all(module(lambda m, x: (x + 1000.0) - x), (3, 7))
    hold(lowered, 3 * normal(4, 3, 7))


def test_products() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.head(F.silu(m.gate(x)) * m.up(x)) * x[:, :1, :5]  # type: ignore[no-any-return]

    parts = {"gate": nn.Linear(7, 11), "up": nn.Linear(7, 11), "head": nn.Linear(11, 5)}
    lowered = hold_all(module(forward, **parts), (3, 7))
    assert lowered.operators.count("int_multiply") == 2
    hold(lowered, 3 * normal(4, 3, 7))


def test_a_gate_for_every_channel() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.conv(x)
        return x * torch.sigmoid(m.gate(x.mean((2, 3), keepdim=True)))

    lowered = hold_all(module(forward, conv=nn.Conv2d(2, 5, 3), gate=nn.Conv2d(5, 5, 1)), (2, 6, 9))
    assert lowered.operators == ["int_conv2d", "int_mean", "int_conv2d", "int_table", "int_multiply"]


def test_means() -> None:
    def forward(m: Any, x: Tensor) -> tuple[Tensor, ...]:
        x = m.map(x)
        plain = x.mean(dim=1), x.mean(dim=(1, -1))
        return *plain, x.mean(dim=-1, keepdim=True), x.mean(dim=(-2, 2), keepdim=True)

    lowered = hold_all(module(forward, map=nn.Linear(7, 5)), (3, 7))
    assert lowered.operators == ["int_linear", *["int_mean"] * 4]
    hold(lowered, 3 * normal(4, 3, 7))


def test_global_average_pooling() -> None:
    def forward(m: Any, x: Tensor) -> tuple[Tensor, ...]:
        x = m.conv(x).relu()
        pooled = F.adaptive_avg_pool2d(x, (1, 1)), F.adaptive_avg_pool1d(x.flatten(2), 1)
        return m.head(F.adaptive_avg_pool2d(x + 1, 1).flatten(1)), *pooled

    lowered = hold_all(module(forward, conv=nn.Conv2d(2, 7, 3), head=nn.Linear(7, 5)), (2, 6, 9))
    assert "int_mean" in lowered.operators


def test_concatenation_of_different_scales() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return torch.cat([m.one(x), 50 * m.two(x)[:, :2], x[:, :1].tanh()], dim=1)

    lowered = hold_all(module(forward, one=nn.Linear(7, 7), two=nn.Linear(7, 7)), (3, 7))
    scales = {name: float(each.scale) for name, each in lowered.plan.activations.items()}
    assert max(scales.values()) > 20 * min(scales.values())
    hold(lowered, 3 * normal(4, 3, 7))


def test_concatenation_behind_relu() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.head(torch.cat([m.one(x), m.two(x)], dim=-1).relu())  # type: ignore[no-any-return]

    hold_all(module(forward, one=nn.Linear(7, 5), two=nn.Linear(7, 3), head=nn.Linear(8, 2)), (3, 7), is_written=False)


def test_concatenation_of_the_same_twice() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.one(x)
        return torch.cat([h, x[:, :, :5], h], dim=1)

    hold_all(module(forward, one=nn.Linear(7, 5)), (3, 7))
