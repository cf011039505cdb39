"""Statistical scales and merged queries and keys: still the engine's bits, hand-worked gradients, and what compiles."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import normfuse
from normfuse.build import FOLDING
from normfuse.capturing import capture_model
from normfuse.errors import UsageError
from normfuse.graph import Graph, ops, query
from normfuse.integer_plan import plan_integers
from normfuse.nn import IntegerTraining, prepare_qat
from normfuse.nn.integer_training import _merged
from normfuse.passes.lower_to_integers import LowerToIntegers
from normfuse.pipeline import Fact, Phase, Pipeline
from normfuse.progress import Silent
from normfuse.quant import quantize_dequantize
from normfuse.recipe import Recipe
from normfuse.report import Reason
from normfuse.testing import Small, seeded

CHANNELS, HEADS, CLASSES = 12, 2, 5
TOKENS = torch.randn(24, 7, CHANNELS, generator=seeded(1))
LOW = Recipe(integer_only=True, bits="w3a8", benchmark=False)


def cut(x: Tensor) -> Tensor:
    return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)


def attend(m: Any, x: Tensor) -> Tensor:
    """One pre-norm attention with biases, a residual and a head."""
    y = m.norm(x)
    mixed = F.scaled_dot_product_attention(cut(m.q(y)), cut(m.k(y)), cut(m.v(y)))
    scores: Tensor = m.head((x + m.o(mixed.transpose(1, 2).flatten(2))).mean(1))
    return scores


def turned(m: Any, x: Tensor) -> Tensor:
    """The same with an attention whose keys are normed."""
    y = m.norm(x)
    mixed = F.scaled_dot_product_attention(cut(m.q(y)), F.layer_norm(cut(m.k(y)), (6,)), cut(m.v(y)))
    scores: Tensor = m.head((x + m.o(mixed.transpose(1, 2).flatten(2))).mean(1))
    return scores


def model(function: Any = attend) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        maps: dict[str, nn.Module] = {name: nn.Linear(CHANNELS, CHANNELS) for name in "qkvo"}
        return Small(function, **maps, norm=nn.LayerNorm(CHANNELS), head=nn.Linear(CHANNELS, CLASSES)).eval()


@cache
def folded(function: Any = attend) -> Graph:
    graph = capture_model(model(function), TOKENS[:2])
    FOLDING.run(graph)
    return graph


def prepared(function: Any = attend, *, recipe: Recipe = LOW, **options: Any) -> IntegerTraining:
    return prepare_qat(folded(function), {"x": TOKENS.numpy()}, recipe=recipe, **options)


def engine(graph: Graph, recipe: Recipe) -> Graph:
    """Return the integers that a compile makes of a folded graph."""
    plan = plan_integers(
        graph, lambda: ([x[None]] for x in TOKENS), recipe=recipe, total=len(TOKENS), progress=Silent()
    )
    found = plan.graph.copy()
    lower = LowerToIntegers(activations=plan.activations, weights=plan.weights)
    Pipeline(phases=(Phase("integers", (lower,)),), given=frozenset({Fact.PLACED})).run(found)
    return found


def train(training: IntegerTraining) -> None:
    """Take some steps, large enough to carry weights across borders."""
    with torch.no_grad():
        wanted = model()(TOKENS)
    optimizer = torch.optim.Adam(training.parameters(), lr=5e-3)
    for _ in range(4):
        loss = F.mse_loss(outputs(training), wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def outputs(training: IntegerTraining, x: Tensor = TOKENS) -> Tensor:
    found = training(x)
    assert isinstance(found, Tensor)
    return found


OPTIONS = [
    pytest.param({}, id="none"),
    pytest.param({"scales_follow": True}, id="scales"),
    pytest.param({"merges_queries_and_keys": True}, id="queries and keys"),
    pytest.param({"scales_follow": True, "merges_queries_and_keys": True, "free_within": 0.2}, id="all three"),
]


@pytest.mark.parametrize("options", OPTIONS)
def test_outputs_are_the_bits_of_the_integers_that_it_stands_for(options: dict[str, Any]) -> None:
    """Before the first step these are what a compile makes of the graph; the scales behind training are its own."""
    training = prepared(**options)
    untrained = outputs(training).detach()
    nearest = Recipe(integer_only=True, bits="w3a8", effort=0)
    graph = _merged(folded())[0] if "merges_queries_and_keys" in options else folded()
    assert torch.equal(untrained, engine(graph, nearest).run(TOKENS)[0])
    train(training)
    found = outputs(training).detach()
    weights = {name: training._rounded(name) for name in training.weights}
    graph = training._plan.graph.copy()
    lower = LowerToIntegers(activations=training._plan.activations, weights=weights)
    Pipeline(phases=(Phase("integers", (lower,)),), given=frozenset({Fact.PLACED})).run(graph)
    assert not torch.equal(found, untrained)
    assert torch.equal(found, graph.run(TOKENS)[0])


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("effort", [0, 1])
def test_what_is_tuned_compiles_to_what_was_trained(options: dict[str, Any], effort: int) -> None:
    """Weights are on their grid and found there; only the ranges of activations are looked for anew."""
    training = prepared(**options)
    train(training)
    found = engine(training.tuned(), Recipe(integer_only=True, bits="w3a8", effort=effort)).run(TOKENS)[0]
    wanted = outputs(training).detach()
    # 3-bit weights that are rounded anew are half a code off; 8-bit activations on other scales are below a percent.
    assert float((found - wanted).norm() / wanted.norm()) < 0.03


def test_codes_of_what_is_tuned_are_those_that_were_trained() -> None:
    training = prepared(scales_follow=True)
    train(training)
    again = prepare_qat(training.tuned(), {"x": TOKENS.numpy()}, recipe=LOW)
    for name, weight in training.weights.items():
        values = training._rounded(name).values
        assert torch.equal(again._rounded(name).values, values)
        assert not torch.equal(values, weight)


def test_what_is_saved_compiles_through_the_front_door(tmp_path: Path) -> None:
    training = prepared(scales_follow=True, merges_queries_and_keys=True)
    train(training)
    training.save(tmp_path / "tuned.pt2")
    built = normfuse.compile(tmp_path / "tuned.pt2", calibration={"x": TOKENS.numpy()}, recipe=LOW)
    wanted = outputs(training).detach()
    assert float((built.engine.graph.run(TOKENS)[0] - wanted).norm() / wanted.norm()) < 0.03


def test_scales_follow_what_is_trained_and_only_if_asked() -> None:
    for follows in (False, True):
        training = prepared(scales_follow=follows)
        before = {name: training._rounded(name).params.scale for name in training.weights}
        with torch.no_grad():
            for weight in training.weights.values():
                weight *= 1.5
        for name, scale in before.items():
            found = training._rounded(name).params.scale
            assert torch.allclose(found, 1.5 * scale if follows else scale, rtol=1e-6)


@pytest.mark.parametrize("follows", [False, True])
def test_gradients_worked_out_by_hand(follows: bool) -> None:
    """Of a linear map alone dL/dW = G^T x and dL/db = sum G, with x of codes; the scale adds nothing."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        layer = nn.Linear(CHANNELS, CLASSES).eval()
    x = TOKENS[:, 0]
    training = prepare_qat(layer, x.numpy(), recipe=LOW, scales_follow=follows)
    gradient = torch.randn(len(x), CLASSES, generator=seeded(3))
    (outputs(training, x) * gradient).sum().backward()
    ((name, weight),) = training.weights.items()
    (params,) = (each for source, each in training._plan.activations.items() if source != name)
    codes = quantize_dequantize(x, params).double()
    ends = training._plan.activations[name]
    made = codes @ training._rounded(name).values.double().T + layer.bias.double()
    inside = (made >= ends.smallest) & (made <= ends.largest)
    wanted = (gradient.double() * inside).T @ codes
    assert bool(inside.all())
    assert weight.grad is not None
    # 24 products of float32, each rounded by 2^-24 of about the largest.
    assert torch.allclose(weight.grad.double(), wanted, rtol=0, atol=24 * 2**-24 * float(wanted.abs().max()))
    bias = training.biases[name].grad
    assert bias is not None
    assert torch.allclose(bias.double(), gradient.double().sum(0), rtol=0, atol=1e-5)


def test_frozen_weights_are_judged_by_scales_that_follow() -> None:
    """Codes of weights and scales that are twice as large are the same, and so are those near a border."""
    free = list[dict[str, Tensor]]()
    for factor in (1.0, 2.0):
        training = prepared(scales_follow=True, free_within=0.1)
        with torch.no_grad():
            for weight in training.weights.values():
                weight *= factor
        outputs(training).square().sum().backward()
        free.append({name: weight.grad != 0 for name, weight in training.weights.items() if weight.grad is not None})
    for name, moves in free[0].items():
        assert 0.05 < float(moves.double().mean()) < 0.4
        assert float((moves == free[1][name]).double().mean()) > 0.95


def test_merged_is_one_map_and_the_model_is_not_changed() -> None:
    before, plain = folded().text(), prepared()
    training = prepared(merges_queries_and_keys=True)
    assert folded().text() == before
    assert plain.merged is None
    assert training.merged is not None
    assert training.merged.applied == {"scores-of-one-map": 1}
    assert len(training.weights) == len(plain.weights) - 1
    assert max(weight.shape for weight in training.weights.values()) == (HEADS * CHANNELS, CHANNELS)
    assert sum(query.is_call(node, ops.LINEAR) for node in training.tuned().nodes) == 4


def test_merged_queries_and_keys_have_the_gradient_of_the_scores() -> None:
    """With M = s K^T Q and d = s K^T b in every head, dL/dQ = s K dL/dM and dL/dK = s (Q (dL/dM)^T + b (dL/dd)^T)."""
    exact = model()
    training = prepared(recipe=Recipe(integer_only=True), merges_queries_and_keys=True)  # 8 bits: near the float model
    gradient = torch.randn(len(TOKENS), CLASSES, generator=seeded(3))
    (outputs(training) * gradient).sum().backward()
    (exact(TOKENS) * gradient).sum().backward()
    (name,) = (name for name, each in training.weights.items() if each.shape == (HEADS * CHANNELS, CHANNELS))
    of_map, of_bias = training.weights[name].grad, training.biases[name].grad
    assert of_map is not None
    assert of_bias is not None
    of_map, of_bias = of_map.reshape(HEADS, CHANNELS, CHANNELS), of_bias.reshape(HEADS, 1, CHANNELS)
    q, k, b = (each.detach().reshape(HEADS, CHANNELS // HEADS, -1) for each in _projections(exact))
    scale = (CHANNELS // HEADS) ** -0.5
    pairs = [(exact.q.weight.grad, k @ of_map), (exact.k.weight.grad, q @ of_map.mT + b @ of_bias)]  # type: ignore[union-attr]
    for wanted, found in pairs:
        # As above: codes are a few tenths of a percent off, a wrong term shows in the direction.
        assert F.cosine_similarity(wanted.flatten(), scale * found.flatten(), 0) > 0.99  # type: ignore[operator, union-attr]
        assert abs(scale * float(found.norm() / wanted.norm()) - 1) < 0.05  # type: ignore[operator, union-attr]


def _projections(exact: Any) -> tuple[Tensor, Tensor, Tensor]:
    return exact.q.weight, exact.k.weight, exact.q.bias


def test_queries_and_keys_that_cannot_be_merged_are_refused_with_the_reason() -> None:
    with pytest.raises(UsageError, match="queries and keys") as error:
        prepared(turned, merges_queries_and_keys=True)
    assert Reason.NO_LINEAR.value in str(error.value)
    assert "keys: made by" in str(error.value)


def test_a_model_without_attention_has_none_to_merge() -> None:
    with pytest.raises(UsageError, match="no queries and keys"):
        prepare_qat(nn.Linear(CHANNELS, 3).eval(), TOKENS[:, 0].numpy(), merges_queries_and_keys=True)
