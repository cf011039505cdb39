"""What goes in and comes out: several of them, any batch, few samples, dead channels, other types."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from integer_module import hold, hold_all, lower, module, normal
from torch import Tensor, nn

from normfuse.testing import randomized


class Several(nn.Module):
    """Three inputs; sums of two of them, an input itself, a view of one."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(7, 5), nn.Linear(4, 5)

    def forward(self, x: Tensor, y: Tensor, z: Tensor) -> tuple[Tensor, ...]:
        return self.one(x) + self.two(y)[:, None], z, x[:, 1:], self.two(y).relu()


def test_several_inputs_and_outputs_and_an_input_that_is_returned() -> None:
    lowered = lower(randomized(Several()), (3, 7), (4,), (2,))
    assert lowered.graph.input_names == ("x", "y", "z")
    assert len(lowered.graph.output_names) == 4
    for batch in (1, 5, 17):
        hold(lowered, (3, 7), (4,), (2,), count=batch)


def test_what_8_and_16_bits_read() -> None:
    def forward(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        h = m.one(x)
        return m.two(torch.tanh(h)) + m.two(h), h

    lowered = hold_all(module(forward, one=nn.Linear(7, 5), two=nn.Linear(5, 6)), (3, 7))
    assert lowered.plan.activations["linear"].type.bits == 16
    assert lowered.plan.activations["linear_request"].type.bits == 8
    assert lowered.operators.count("requantize") == 1


class Ignoring(nn.Module):
    """One of two inputs is not read."""

    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(7, 5)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.map(x)  # type: ignore[no-any-return]


def test_an_input_that_nothing_reads() -> None:
    hold_all(randomized(Ignoring()), (3, 7), (4,))


RETURNED: dict[str, Callable[[Any, Tensor], Any]] = {
    "two of the same codes": lambda m, x: (m.one(x), m.two(m.one(x)), m.one(x)),
    "a constant": lambda m, x: (m.one(x), m.table),
}


@pytest.mark.parametrize("function", RETURNED.values(), ids=RETURNED)
def test_what_is_returned(function: Callable[[Any, Tensor], Any]) -> None:
    hold_all(module(function, one=nn.Linear(7, 5), two=nn.Linear(5, 6), table=torch.zeros(3)), (3, 7))


def mlp() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        return x + m.two(torch.relu(m.one(m.norm(x))))  # type: ignore[no-any-return]

    return module(forward, one=nn.Linear(7, 5), two=nn.Linear(5, 7), norm=nn.LayerNorm(7))


def test_any_batch() -> None:
    lowered = lower(mlp(), (3, 7))
    for batch in (1, 2, 64):
        hold(lowered, (3, 7), count=batch)


def test_a_fixed_batch() -> None:
    program = torch.export.export(mlp(), (normal(4, 3, 7),))
    hold(lower(program, (3, 7)), (3, 7), count=4)


@pytest.mark.parametrize("count", [1, 2, 7])
def test_few_samples(count: int) -> None:
    hold_all(mlp(), (3, 7), count=count, is_written=False)


@pytest.mark.parametrize("value", [0.0, -3.7])
def test_samples_that_are_all_the_same(value: float) -> None:
    samples = torch.full((16, 3, 7), value)
    lowered = lower(mlp(), samples, is_written=False)
    hold(lowered, samples)


def dead_channels(network: Any) -> None:
    network.one.weight[2], network.one.bias[2], network.two.weight[:, 1] = 0, 0, 0


def dead_layer(network: Any) -> None:
    network.one.weight.zero_()


def silent_layer(network: Any) -> None:
    network.one.weight.zero_()
    network.one.bias.fill_(-1.0)


def nearly_dead_channel(network: Any) -> None:
    network.one.weight[0] *= 1e-20
    network.two.weight[:, 0] *= 1e10


def huge_bias(network: Any) -> None:
    network.one.bias[0] = 1e8


@pytest.mark.parametrize("kill", [dead_channels, dead_layer, silent_layer, nearly_dead_channel, huge_bias])
def test_degenerate_layers(kill: Callable[[nn.Module], None]) -> None:
    network = mlp()
    with torch.no_grad():
        kill(network)
    lowered = hold_all(network, (3, 7), is_written=kill in (dead_channels, huge_bias))
    hold(lowered, 3 * normal(4, 3, 7))


class Wide(nn.Module):
    """A model of another type."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.map = nn.Linear(7, 5, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.map(x)  # type: ignore[no-any-return]
