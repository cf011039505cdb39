"""Codes of norms with a scale per token: where they are written, how near they are, and where they are not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Final

import pytest
import torch
from integer_module import Lowered, hold, lower, module, normal
from torch import Tensor, nn
from torch.nn import functional as F

from normfuse.errors import UsageError
from normfuse.nn import prepare_qat
from normfuse.quant.integer_forms import NormForm
from normfuse.recipe import CalibrationMethod, Recipe
from normfuse.report import Reason

BY_TOKEN: Final = Recipe(integer_only=True, norm=NormForm.PER_TOKEN)
BY_TENSOR: Final = Recipe(integer_only=True)
WIDTH, TOKENS = 7, 3

norms = pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])


def feed_forward(m: Any, x: Tensor) -> Tensor:
    return x + m.down(F.gelu(m.up(m.norm(x))))  # type: ignore[no-any-return]


def block(norm: nn.Module) -> nn.Module:
    return module(feed_forward, norm=norm, up=nn.Linear(WIDTH, 9), down=nn.Linear(9, WIDTH))


def by_token(original: nn.Module, *shapes: Any, recipe: Recipe = BY_TOKEN, **options: Any) -> Lowered:
    return lower(original, *shapes, recipe=recipe, **options)


@norms
def test_a_norm_in_front_of_a_linear_map(norm: Callable[[int], nn.Module]) -> None:
    lowered = by_token(block(norm(WIDTH)), (TOKENS, WIDTH))
    assert sorted(lowered.operators) == [
        "int_linear_add",
        "int_linear_tokens_table",
        "int_token_codes",
        "int_token_factors",
    ]
    hold(lowered, (TOKENS, WIDTH))
    hold(lowered, 5 * normal(4, TOKENS, WIDTH, seed=4))


@norms
def test_without_a_table_and_with_a_bound(norm: Callable[[int], nn.Module]) -> None:
    def forward(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        normed = m.norm(x)
        return m.a(normed).relu(), m.b(normed)

    parts = {"norm": norm(WIDTH), "a": nn.Linear(WIDTH, 5), "b": nn.Linear(WIDTH, 4, bias=False)}
    lowered = by_token(module(forward, **parts), (TOKENS, WIDTH))
    assert lowered.operators.count("int_token_codes") == 1
    assert lowered.operators.count("int_linear_tokens") in (1, 2), "both maps, or both in one"
    hold(lowered, (TOKENS, WIDTH))


def attend(m: Any, x: Tensor) -> Tensor:
    normed = m.norm(x)
    q, k, v = (each(normed).unflatten(-1, (2, 3)).transpose(1, 2) for each in (m.q, m.k, m.v))
    mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    return x + m.out(mixed)  # type: ignore[no-any-return]


@norms
def test_queries_keys_and_values(norm: Callable[[int], nn.Module]) -> None:
    maps = {name: nn.Linear(WIDTH, 6) for name in "qkv"}
    lowered = by_token(module(attend, norm=norm(WIDTH), out=nn.Linear(6, WIDTH), **maps), (TOKENS, WIDTH))
    assert "int_linear_tokens" in lowered.operators
    assert "int_attention" in lowered.operators
    hold(lowered, (TOKENS, WIDTH))


@pytest.mark.parametrize("bits", ["w4a8", "w2a8"])
def test_few_bits(bits: str) -> None:
    recipe = replace(BY_TOKEN, bits=bits, effort=0)
    hold(by_token(block(nn.RMSNorm(WIDTH)), (TOKENS, WIDTH), recipe=recipe), (TOKENS, WIDTH))


@norms
@pytest.mark.parametrize("eps", [1e-30, 1.0, 1e4])
def test_every_eps(norm: Any, eps: float) -> None:
    hold(by_token(block(norm(WIDTH, eps=eps)), (TOKENS, WIDTH), is_written=False), (TOKENS, WIDTH))


@norms
def test_tokens_of_nothing_and_of_one_number(norm: Any) -> None:
    samples = normal(16, TOKENS, WIDTH)
    samples[::2, 0], samples[1::3, 1] = 0.0, 3.3
    hold(by_token(block(norm(WIDTH)), samples), samples[:5])


@pytest.mark.parametrize(("width", "outputs"), [(1, 5), (129, 1), (1823, 3)])
def test_odd_sizes(width: int, outputs: int) -> None:
    network = module(lambda m, x: m.map(m.norm(x)), norm=nn.RMSNorm(width), map=nn.Linear(width, outputs))
    hold(by_token(network, (2, width)), (2, width))


def test_a_row_of_almost_no_weights() -> None:
    """Its bias still fits: the row's scale is raised, as behind codes of one scale."""
    network: Any = module(lambda m, x: m.map(m.norm(x)), norm=nn.LayerNorm(WIDTH), map=nn.Linear(WIDTH, 5))
    with torch.no_grad():
        network.map.weight[2] *= 1e-9
        network.map.bias[2] = 3.0
    lowered = by_token(network, (TOKENS, WIDTH))
    hold(lowered, (TOKENS, WIDTH))
    assert float((lowered.graph.run(normal(9, TOKENS, WIDTH))[0][..., 2] - 3).abs().max()) < 1e-3


def test_an_outlier_in_one_token_costs_the_others_nothing() -> None:
    """One scale for the tensor has to hold a token whose norm has a large number; the others' codes get coarse."""
    samples = normal(16, 8, 129)
    samples[:, 0, 5] = 400.0
    network = module(lambda m, x: m.map(m.norm(x)), norm=nn.RMSNorm(129), map=nn.Linear(129, 6))
    with torch.no_grad():
        wanted = network(samples)[:, 1:]

    def error(recipe: Recipe) -> float:
        lowered = lower(
            network, samples, recipe=replace(recipe, calibration=CalibrationMethod.MIN_MAX), is_written=False
        )
        return float((lowered.graph.run(samples)[0][:, 1:] - wanted).square().mean())

    assert error(BY_TOKEN) < 0.5 * error(BY_TENSOR)


def windows(m: Any, x: Tensor) -> Tensor:
    """Swin's way: tokens are shifted and cut into windows between norm and map."""
    y = m.norm(x).roll((1, 1), (1, 2)).reshape(-1, 2, 2, 3, 2, WIDTH).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, WIDTH)
    return m.map(y)  # type: ignore[no-any-return]


VIEWS: Final[dict[str, tuple[Callable[[Any, Tensor], Tensor], tuple[int, ...]]]] = {
    "a token is taken": (lambda m, x: m.map(m.norm(x)[:, 0]), (TOKENS, WIDTH)),
    "some tokens are": (lambda m, x: m.map(m.norm(x)[:, 1:]), (TOKENS, WIDTH)),
    "batch and tokens change places": (lambda m, x: m.map(m.norm(x).transpose(0, 1)), (TOKENS, WIDTH)),
    "flattened": (lambda m, x: m.map(m.norm(x).flatten(0, 1)), (TOKENS, WIDTH)),
    "windows": (windows, (4, 6, WIDTH)),
}


@norms
@pytest.mark.parametrize("name", VIEWS)
def test_views_that_leave_tokens_whole(name: str, norm: Callable[[int], nn.Module]) -> None:
    forward, shape = VIEWS[name]
    lowered = by_token(module(forward, norm=norm(WIDTH), map=nn.Linear(WIDTH, 5)), shape)
    assert "int_linear_tokens" in lowered.operators
    hold(lowered, shape)


def test_a_transformer_of_torch() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True, activation="gelu")
    lowered = by_token(layer.eval(), (5, 8))
    assert lowered.operators.count("int_token_codes") == 2
    hold(lowered, (5, 8))


def test_a_row_of_almost_no_weights_behind_a_view() -> None:
    network: Any = module(lambda m, x: m.map(m.norm(x)[:, 0]), norm=nn.LayerNorm(WIDTH), map=nn.Linear(WIDTH, 5))
    with torch.no_grad():
        network.map.weight[2] *= 1e-9
        network.map.bias[2] = 3.0
    hold(by_token(network, (TOKENS, WIDTH)), (TOKENS, WIDTH))


VIEWS_THAT_MIX: Final[dict[str, tuple[Callable[[Any, Tensor], Tensor], tuple[int, ...], int]]] = {
    "tokens are joined": (lambda m, x: m.map(m.norm(x).flatten(1)), (TOKENS, WIDTH), TOKENS * WIDTH),
    "channels are cut": (lambda m, x: m.map(m.norm(x)[..., :4]), (TOKENS, WIDTH), 4),
    "channels are tokens": (lambda m, x: m.map(m.norm(x).transpose(1, 2)), (WIDTH, WIDTH), WIDTH),
    "channels are shifted": (lambda m, x: m.map(m.norm(x).roll(1, -1)), (TOKENS, WIDTH), WIDTH),
    "as many tokens as channels": (
        lambda m, x: m.map(m.norm(x).reshape(-1, 2, 2, WIDTH).transpose(2, 3).reshape(-1, 2, WIDTH)),
        (4, WIDTH),
        WIDTH,
    ),
}


@pytest.mark.parametrize("name", VIEWS_THAT_MIX)
def test_views_that_take_tokens_apart(name: str) -> None:
    forward, shape, inputs = VIEWS_THAT_MIX[name]
    assert refusals(module(forward, norm=nn.RMSNorm(WIDTH), map=nn.Linear(inputs, 5)), shape)


def refusals(original: nn.Module, *shapes: Any) -> dict[str, str]:
    """Return the layers whose norms keep one scale, and why; everything is still right."""
    lowered = by_token(original, *shapes)
    hold(lowered, *shapes)
    assert not any("token" in name for name in lowered.operators)
    refused = [each for report in lowered.plan.passes for each in report.refused]
    return {each.layer: each.detail for each in refused if each.reason is Reason.NOT_BY_TOKEN}


def test_a_norm_that_is_the_stream() -> None:
    """As in BERT: what a residual adds has one scale."""

    def forward(m: Any, x: Tensor) -> Tensor:
        normed = m.norm(x)
        return normed + m.map(normed)  # type: ignore[no-any-return]

    found = refusals(module(forward, norm=nn.LayerNorm(WIDTH), map=nn.Linear(WIDTH, WIDTH)), (TOKENS, WIDTH))
    assert set(found) == {"norm"}


def test_a_norm_in_front_of_a_function() -> None:
    network = module(lambda m, x: m.map(torch.tanh(m.norm(x))), norm=nn.LayerNorm(WIDTH), map=nn.Linear(WIDTH, 5))
    assert set(refusals(network, (TOKENS, WIDTH))) == {"norm"}


def test_a_norm_in_front_of_a_convolution() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.map(m.norm(x).transpose(1, 2).unflatten(-1, (2, 2)))  # type: ignore[no-any-return]

    found = refusals(module(forward, norm=nn.RMSNorm(WIDTH), map=nn.Conv2d(WIDTH, 5, 1)), (4, WIDTH))
    assert set(found) == {"norm"}


def test_a_map_that_is_computed_in_one_with_a_sum() -> None:
    network = module(lambda m, x: x + m.map(m.norm(x)), norm=nn.RMSNorm(WIDTH), map=nn.Linear(WIDTH, WIDTH))
    assert refusals(network, (TOKENS, WIDTH)) == {
        "norm": "aten.linear at map reads it, which is computed in one with a sum"
    }


def test_norms_over_several_axes() -> None:
    network = module(lambda m, x: m.map(m.norm(x)), norm=nn.LayerNorm((TOKENS, WIDTH)), map=nn.Linear(WIDTH, 5))
    assert set(refusals(network, (TOKENS, WIDTH))) == {"norm"}


def test_nothing_is_refused_where_nobody_asked() -> None:
    lowered = lower(block(nn.LayerNorm(WIDTH)), (TOKENS, WIDTH), is_written=False)
    assert not any("token" in name for name in lowered.operators)
    assert not [each for report in lowered.plan.passes for each in report.refused]


@norms
def test_training_computes_what_ships(norm: Callable[[int], nn.Module]) -> None:
    network, samples = block(norm(WIDTH)), normal(16, TOKENS, WIDTH, seed=1)
    lowered = by_token(network, samples)
    training = prepare_qat(network, samples.numpy(), [samples[:2]], recipe=BY_TOKEN)
    made = training(samples[:5])
    assert torch.equal(made, lowered.graph.run(samples[:5])[0])
    made.square().sum().backward()
    assert all(float(weight.grad.abs().sum()) > 0 for weight in training.parameters() if weight.grad is not None)
    assert all(weight.grad is not None for weight in training.parameters())


@norms
def test_gradients_pass_through_the_norm(norm: Callable[[int], nn.Module]) -> None:
    """Codes of tokens end nowhere: the gradient is that of the float network, to what rounding changes."""
    network, samples = block(norm(WIDTH)), normal(64, TOKENS, WIDTH, seed=1)
    training = prepare_qat(network, samples.numpy(), [samples[:2]], recipe=BY_TOKEN)
    x = samples.clone().requires_grad_()
    training(x).sin().sum().backward()
    y = samples.clone().requires_grad_()
    network(y).sin().sum().backward()
    assert x.grad is not None
    assert y.grad is not None
    assert float((x.grad - y.grad).norm() / y.grad.norm()) < 0.1


def test_options_that_do_not_go_together() -> None:
    with pytest.raises(UsageError, match="norm cannot be per-token"):
        Recipe(norm=NormForm.PER_TOKEN)
    with pytest.raises(UsageError, match="norm cannot be per-token"):
        Recipe(integer_only=True, allow_float_islands=True, norm=NormForm.PER_TOKEN)
