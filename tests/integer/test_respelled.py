"""What is respelled before it becomes integers: every code is near enough, and the file has the reference's bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from integer_module import Lowered, hold_all, lower, module, normal
from torch import Tensor, nn
from torch.nn import functional as F

import normfuse
from normfuse.testing import Small


def test_vectors_of_length_one() -> None:
    def forward(m: Any, x: Tensor) -> tuple[Tensor, ...]:
        y = m.map(x)
        return F.normalize(y, dim=-1), F.normalize(y, dim=1), m.out(y / y.norm(dim=-1, keepdim=True))

    lowered = hold_all(module(forward, map=nn.Linear(7, 6), out=nn.Linear(6, 5)), (3, 7))
    assert lowered.operators.count("int_rms_norm") == 3


def test_a_vector_of_zeros_stays_zeros() -> None:
    lowered = lower(Small(lambda m, x: F.normalize(x, dim=-1)).eval(), (3, 7), is_written=False)
    assert not lowered.graph.run(torch.zeros(2, 3, 7))[0].any()


def pooled(m: Any, x: Tensor) -> tuple[Tensor, ...]:
    y = m.conv(x)
    return (
        F.avg_pool2d(y, 2),
        F.avg_pool2d(y, 3, 2, 1, count_include_pad=False).relu(),
        F.avg_pool2d(y.relu(), 3, 2, ceil_mode=True),
        F.adaptive_avg_pool2d(y, (2, 3)),
        m.one_axis(F.avg_pool1d(y.flatten(2), 3, 2)).relu(),
        F.max_pool1d(y.flatten(2).relu(), 3, 2),
    )


@pytest.mark.slow
def test_windows_and_convolutions_of_one_axis() -> None:
    network = module(pooled, conv=nn.Conv2d(2, 3, 1), one_axis=nn.Conv1d(3, 4, 3, padding=1))
    lowered = hold_all(network, (2, 8, 6))
    assert lowered.operators.count("int_conv2d") == 7


@pytest.mark.parametrize("kernel", [2, 3, 7])
def test_a_mean_of_a_window_has_one_weight_and_no_error(kernel: int) -> None:
    """64 codes of 1 / (64 k k) each: what is left is the rounding of the result."""
    lowered = lower(Small(lambda m, x: F.avg_pool2d(x, kernel)).eval(), (3, 14, 21), is_written=False)
    (weight,) = lowered.plan.weights.values()
    assert set(weight.codes.unique().tolist()) == {64}
    assert torch.allclose(weight.params.scale.double() * 64, torch.tensor(1 / kernel**2, dtype=torch.float64))


def normed(m: Any, x: Tensor) -> tuple[Tensor, ...]:
    y = m.conv(x)
    return m.layer(y), m.group(y), m.instance(y), m.out(m.group(y))


@pytest.mark.slow
def test_norms_over_several_axes() -> None:
    norms = {"layer": nn.LayerNorm((6, 5)), "group": nn.GroupNorm(2, 4), "instance": nn.InstanceNorm2d(4, affine=True)}
    lowered = hold_all(module(normed, conv=nn.Conv2d(2, 4, 1), out=nn.Conv2d(4, 3, 1), **norms), (2, 6, 5))
    assert lowered.operators.count("int_layer_norm") >= 3


def single(m: Any, x: Tensor) -> tuple[Tensor, ...]:
    y = m.map(x)
    return (
        *(y.clamp(-0.5, 0.7), m.out(y.clamp(min=0.1)), torch.minimum(F.relu(y), torch.tensor(0.5))),
        *(y**2, y**3, y.sum(-1), F.glu(y), m.act(y), y.abs(), F.selu(y), F.celu(y), F.logsigmoid(y)),
        0.5 * y * (1 + torch.tanh(0.797885 * (y + 0.044715 * y**3))),
    )


@pytest.mark.slow
def test_functions_and_bounds() -> None:
    hold_all(module(single, map=nn.Linear(7, 6), out=nn.Linear(6, 5), act=nn.PReLU(3)), (3, 7))


def moved(m: Any, x: Tensor) -> tuple[Tensor, ...]:
    y = m.conv(x)
    return (
        *(torch.stack((y, y.relu()), 1), F.pixel_shuffle(y, 2), F.pixel_unshuffle(y, 2)),
        *(F.pad(y, (1, 2, 0, 1), mode="reflect"), y.repeat_interleave(2, 1)),
        torch.bmm(y.flatten(2), y.flatten(2).mT),
    )


@pytest.mark.slow
def test_moves() -> None:
    hold_all(module(moved, conv=nn.Conv2d(2, 4, 1)), (2, 6, 4))


def test_a_scale_per_head() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        q, k, v = (each(x).reshape(-1, 5, 2, 4).transpose(1, 2) for each in (m.q, m.k, m.v))
        scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(2, 3) * m.scale.exp() + m.bias
        return m.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))  # type: ignore[no-any-return]

    layers = {**{name: nn.Linear(7, 8) for name in "qkv"}, "out": nn.Linear(8, 3)}
    held = {"scale": torch.zeros(2, 1, 1), "bias": torch.zeros(2, 5, 5)}
    lowered: Lowered = hold_all(module(forward, **layers, **held), (5, 7), is_written=False)
    assert lowered.operators.count("int_attention") == 1


def test_a_model_without_weights_ships_as_integers() -> None:
    attention = Small(lambda m, x: (x @ x.transpose(1, 2)).softmax(-1) @ x).eval()
    recipe = normfuse.Recipe(integer_only=True, benchmark=False, max_drop=1.0)
    built = normfuse.compile(attention, (normal(2, 6, 7),), calibration=normal(16, 6, 7), recipe=recipe)
    assert built.report["verdict"]["ships"] == "integers"


def test_sums_with_a_factor() -> None:
    def forward(m: Any, x: Tensor) -> tuple[Tensor, ...]:
        a, b = m.a(x), m.b(x)
        return torch.add(a, b, alpha=2), torch.sub(a, b, alpha=0.5), torch.add(x, m.c(x), alpha=-3)

    parts = {name: nn.Linear(7, 7) for name in "abc"}
    hold_all(module(forward, **parts), (3, 7))
