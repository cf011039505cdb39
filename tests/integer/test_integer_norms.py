"""Layer and RMS norm with every gamma, beta and eps, and scales per channel behind them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from integer_module import Lowered, computed_or_refused, hold, hold_all, lower, module, normal
from torch import Tensor, nn
from torch.nn import functional as F

from normfuse.graph import query
from normfuse.integer.lowering import LARGEST_BIAS
from normfuse.kernels.reference.norms import FRACTION

NORMS: list[Callable[[int], nn.Module]] = [
    nn.LayerNorm,
    lambda width: nn.LayerNorm(width, bias=False),
    lambda width: nn.LayerNorm(width, elementwise_affine=False),
    lambda width: nn.LayerNorm(width, eps=1.0),
    lambda width: nn.LayerNorm(width, eps=1e4),
    lambda width: nn.LayerNorm(width, eps=1e6, elementwise_affine=False),
    lambda width: nn.LayerNorm(width, eps=1e-30),
    nn.RMSNorm,
    lambda width: nn.RMSNorm(width, elementwise_affine=False),
    lambda width: nn.RMSNorm(width, eps=1e4),
]


@pytest.mark.slow
@pytest.mark.parametrize("width", [7, 129])
def test_norms_of_a_stream(width: int) -> None:
    """They are returned, so they have 16 bits."""

    def forward(m: Any, x: Tensor) -> tuple[Tensor, ...]:
        x = m.map(x)
        return tuple(norm(x) for norm in m.norms)

    norms = nn.ModuleList(norm(width) for norm in NORMS)
    lowered = hold_all(module(forward, map=nn.Linear(5, width), norms=norms), (3, 5))
    assert lowered.operators == ["int_linear", *["int_layer_norm"] * 7, *["int_rms_norm"] * 3]
    hold(lowered, 3 * normal(4, 3, 5))


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
def test_norms_in_front_of_a_linear_map(norm: Callable[[int], nn.Module]) -> None:
    network = module(lambda m, x: x + m.map(m.norm(x)), map=nn.Linear(7, 7), norm=norm(7))
    lowered = hold_all(network, (3, 7), is_written=False)
    assert lowered.operators[-1] == "int_linear_add"
    assert len(lowered.operators) == 2, "gamma and beta are part of the map, or of the norm"


@pytest.mark.parametrize("spread", [1e-6, 1e-2, 1e3])
def test_rows_of_any_size(spread: float) -> None:
    rows = spread * normal(16, 3, 7) * torch.logspace(-3, 0, 16)[:, None, None]
    hold(lower(module(lambda m, x: m.norm(x), norm=nn.LayerNorm(7)), rows, is_written=False), rows[-5:])


@pytest.mark.parametrize("value", [0.0, 3.3, -1e4])
def test_rows_that_are_constant(value: float) -> None:
    rows = torch.full((16, 3, 7), value)
    hold(lower(module(lambda m, x: m.norm(x), norm=nn.LayerNorm(7)), rows, is_written=value != 0), rows[:5])


def test_one_channel() -> None:
    hold_all(module(lambda m, x: m.norm(x), norm=nn.LayerNorm(1)), (3, 1))


def without_gamma(network: Any, *channels: int) -> Any:
    with torch.no_grad():
        network.norm.weight[list(channels)] = 0
    return network


@pytest.mark.parametrize("channels", [(2,), range(7)], ids=["one", "all"])
def test_a_gamma_of_zero_in_front_of_a_linear_map(channels: Any) -> None:
    """tanh keeps gamma and beta in the norm."""
    network = module(lambda m, x: m.map(torch.tanh(m.norm(x))), map=nn.Linear(7, 5), norm=nn.LayerNorm(7))
    hold_all(without_gamma(network, *channels), (3, 7), is_written=False)


@pytest.mark.parametrize("channels", [(2,), range(7)], ids=["one", "all"])
def test_a_gamma_of_zero_leaves_beta(channels: Any) -> None:
    """With 16 bits beta is not exact: gamma is raised to 2^-30 of it, for steps of 2^-20 (``per_channel``)."""
    network = without_gamma(module(lambda m, x: m.norm(x), norm=nn.LayerNorm(7)), *channels)
    lowered, inputs = lower(network, (3, 7), is_written=False), normal(5, 3, 7, seed=9)
    with torch.no_grad():
        wanted = network(inputs)
    normalized = F.layer_norm(inputs, (7,)).abs().amax()
    raised = wanted.abs() * normalized * 2**FRACTION / LARGEST_BIAS
    (found,) = lowered.graph.run(inputs)
    assert ((found - wanted).abs() <= raised + _scale(lowered))[..., list(channels)].all()


def _scale(lowered: Lowered) -> float:
    (output,) = lowered.graph.outputs
    return float(query.constant(lowered.graph, query.operand(output, 1)))


def test_a_scale_per_channel_is_part_of_the_norm_in_front_of_it() -> None:
    network = module(
        lambda m, x: m.norm(x) * m.scale + m.shift, norm=nn.LayerNorm(7), scale=torch.zeros(7), shift=torch.zeros(7)
    )
    assert hold_all(network, (3, 7)).operators == ["int_layer_norm"]


@pytest.mark.parametrize("has_gamma", [True, False], ids=["gamma", "no gamma"])
@pytest.mark.parametrize("width", [3, 7], ids=["as many tokens as channels", "more channels"])
def test_a_scale_per_token_behind_a_norm(width: int, has_gamma: bool) -> None:
    """It is none per channel, however many there are."""
    norm = nn.LayerNorm(width, elementwise_affine=has_gamma)
    network: Any = module(
        lambda m, x: m.norm(x) * m.scale + m.shift, norm=norm, scale=torch.zeros(3, 1), shift=torch.zeros(3, 1)
    )
    with torch.no_grad():
        network.scale.copy_(torch.tensor([[0.5], [1.0], [2.0]]))
        network.shift.copy_(torch.tensor([[0.3], [-1.0], [0.1]]))
    computed_or_refused(network, (3, width), where="norm")


def test_a_bound_behind_a_norm() -> None:
    def forward(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        return m.map(m.norm(x).relu()), F.relu6(m.norm(x))

    hold_all(module(forward, norm=nn.RMSNorm(7), map=nn.Linear(7, 5)), (3, 7))


def prepbn(m: Any, x: Tensor) -> Tensor:
    """A block with PRepBN in it, scale and shift per channel, whose stream others read."""
    x = m.stem(x)
    normed = m.norm(x.transpose(1, 2)).transpose(1, 2) + 0.3 * x
    return x + m.map(torch.relu(normed)) + normed  # type: ignore[no-any-return]


def test_a_scale_per_channel_behind_a_stream() -> None:
    parts = {"stem": nn.Linear(7, 6), "norm": nn.BatchNorm1d(6), "map": nn.Linear(6, 6)}
    lowered = hold_all(module(prepbn, **parts), (3, 7), is_written=False)
    assert "requantize" in lowered.operators
    hold(lowered, 3 * normal(4, 3, 7))
