"""Each score has its bits; the network says which of them it bears best, where they differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from small_subject import activation_named, made, map_named, placement_of, subject_of
from torch import Tensor, nn
from torch.nn.functional import log_softmax

from normfuse.graph import Graph
from normfuse.graph.quantization import requested_weights, requests
from normfuse.precision.assignment import assigned
from normfuse.precision.decision import Quantization
from normfuse.precision.simulation import Simulation
from normfuse.progress import Silent
from normfuse.quant import QuantParams
from normfuse.quant.allocation import BudgetTooSmall
from normfuse.quant.bits import FLOAT, Bits
from normfuse.sensitivity import choosing
from normfuse.sensitivity.choosing import Choice, choose, outputs_lose, rounded
from normfuse.sensitivity.output_loss import OutputLoss
from normfuse.sensitivity.sensitivity import Sensitivity
from normfuse.sensitivity.subject import Subject
from normfuse.sensitivity.units import BOPS, WEIGHT_BITS, Member, members_of, options, use_of
from normfuse.testing import seeded

X = torch.randn(7, 9, generator=seeded(0))
JUDGING = [[X[:5]], [X[5:]]]
PARTS = made(a=nn.Linear(9, 7), b=nn.Linear(7, 5), c=nn.Linear(5, 4))


@cache
def subject() -> Subject:
    return subject_of(lambda m, x: m.c(m.b(m.a(x).relu()).tanh()), X[:3], parts=PARTS)


@cache
def members() -> list[Member]:
    return members_of(subject().graph, [X])


def bits_of(**layers: Bits) -> dict[str, Bits]:
    return {map_named(subject(), layer).name: bits for layer, bits in layers.items()}


MIXED = {"a": Bits(2, 8), "b": Bits(8, 3), "c": Bits(4, FLOAT)}


def test_rounded_networks_have_the_codes_of_their_bits() -> None:
    graph, decided = rounded(subject(), bits_of(**MIXED))
    assert [request.type.bits for request in requests(graph)] == [8, 3]
    assert [asked.type.bits for asked in requested_weights(graph).values()] == [2, 8, 4]
    assert {name: weight.params.type.bits for name, weight in decided.weights.items()} == {
        name: bits.weight for name, bits in bits_of(**MIXED).items()
    }
    for layer, width in (("a", 2), ("b", 8)):
        node = map_named(subject(), layer)
        assert torch.equal(decided.weights[node.name].codes, subject().weight(node, width).codes)
    request = activation_named(subject(), "b")
    found, expected = decided.activations[request.source.name], subject().params(request, 3)
    assert isinstance(found, QuantParams)
    assert isinstance(expected, QuantParams)
    assert (float(found.scale), int(found.zero_point), found.type) == (
        float(expected.scale),
        int(expected.zero_point),
        expected.type,
    )
    assert len(decided.activations) == 2


def test_rounding_leaves_the_subject_alone() -> None:
    before = subject().graph.text()
    rounded(subject(), bits_of(**MIXED))
    assert subject().graph.text() == before


def divergence(outputs: Tensor, exact: Tensor) -> Tensor:
    log_p, log_q = log_softmax(exact.double(), 1), log_softmax(outputs.double(), 1)
    return (log_p.exp() * (log_p - log_q)).sum(1).mean()


def test_what_outputs_lose_is_the_mean_over_samples() -> None:
    graph, decided = rounded(subject(), bits_of(**MIXED))
    (outputs,) = graph.run_as([X], Simulation(decided))
    expected = float(divergence(outputs.detach(), subject().graph.run(X)[0]))
    # Of 7 samples; what float32 adds to outputs is about a millionth of what two bits do.
    assert outputs_lose(graph, decided, JUDGING, OutputLoss.DIVERGENCE) == pytest.approx(expected, rel=1e-4)
    assert outputs_lose(graph, decided, [[X]], OutputLoss.DIVERGENCE) == pytest.approx(expected, rel=1e-4)


def test_outputs_of_several_axes_are_compared_by_their_noise() -> None:
    """The second output is of integers."""

    def function(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        y = m.c(m.a(x).relu())
        return y.unsqueeze(2), y.argmax(1)

    tokens = subject_of(function, X, parts=made(a=nn.Linear(9, 7), c=nn.Linear(7, 4)))
    graph, decided = rounded(tokens, {node.name: Bits(4, 8) for node in tokens.maps})
    outputs = graph.run_as([X], Simulation(decided))[0].detach().double()
    exact = tokens.graph.run(X)[0].double()
    expected = ((outputs - exact).square().sum((1, 2)) / exact.square().sum((1, 2))).mean()
    assert outputs_lose(graph, decided, JUDGING, OutputLoss.NOISE) == pytest.approx(float(expected), rel=1e-4)


def test_float_outputs_lose_nothing() -> None:
    graph, decided = rounded(subject(), dict.fromkeys(bits_of(**MIXED), Bits(FLOAT, FLOAT)))
    assert decided.weights == {}
    assert decided.activations == {}
    assert outputs_lose(graph, decided, JUDGING, OutputLoss.DIVERGENCE) == 0


def score(method: str, **damages: float) -> Sensitivity:
    """Of weights at two bits, by layer."""
    weights = {map_named(subject(), layer).name: {2: amount, 8: 0.0} for layer, amount in damages.items()}
    activations = {request.source.name: {8: 0.0} for request in subject().activations}
    return Sensitivity(method=method, weights=weights, activations=activations)


FIRST_MATTERS = score("first", a=5.0, b=1.0, c=1.0)
LAST_MATTERS = score("last", a=1.0, b=1.0, c=5.0)
FIRST_MATTERS_MORE = score("first more", a=50.0, b=1.0, c=2.0)

CHOICES = options([2, 8], [8])
LIMIT = {WEIGHT_BITS: 63 * 8 + 35 * 2 + 20 * 2}
"""Eight bits for the first map, or for both of the others."""


class Decide:
    """``rounded``, which keeps what it was asked for."""

    def __init__(self) -> None:
        self.asked = list[dict[str, Bits]]()

    def __call__(self, bits: Mapping[str, Bits]) -> tuple[Graph, Quantization]:
        self.asked.append(dict(bits))
        return rounded(subject(), bits)


def chosen(decide: Decide, *scores: Sensitivity, limits: Mapping[str, float] = LIMIT, **given: Any) -> list[Choice]:
    options_ = {"judging": JUDGING, "loss": OutputLoss.DIVERGENCE, "progress": Silent(), **given}
    return choose(members(), scores, CHOICES, limits, decide=decide, **options_)


BY_FIRST = {"a": Bits(8, 8), "b": Bits(2, 8), "c": Bits(2, 8)}
BY_LAST = {"a": Bits(2, 8), "b": Bits(8, 8), "c": Bits(8, 8)}
PLAIN = dict.fromkeys("abc", Bits(2, 8))


def test_every_score_gets_its_optimum() -> None:
    found = {choice.method: choice for choice in chosen(Decide(), FIRST_MATTERS, LAST_MATTERS)}
    assert found["first"].bits == bits_of(**BY_FIRST)
    assert found["last"].bits == bits_of(**BY_LAST)
    assert found["first"].allocation.damage == 2
    assert found["last"].allocation.damage == 1
    assert found["last"].allocation.use[WEIGHT_BITS] == 63 * 2 + 35 * 8 + 20 * 8
    assert found["last"].allocation.bits == {member.name: found["last"].bits[member.name] for member in members()}


@pytest.mark.parametrize("scores", [(FIRST_MATTERS, LAST_MATTERS), (LAST_MATTERS, FIRST_MATTERS)])
def test_the_outputs_say_which_is_best(scores: Sequence[Sensitivity]) -> None:
    losses = {
        name: outputs_lose(*rounded(subject(), bits_of(**bits)), JUDGING, OutputLoss.DIVERGENCE)
        for name, bits in (("first", BY_FIRST), ("last", BY_LAST), ("uniform", PLAIN))
    }
    assert len(set(losses.values())) == 3
    found = chosen(Decide(), *scores)
    assert [(choice.method, choice.loss) for choice in found] == sorted(losses.items(), key=lambda each: each[1])


def test_equal_bits_are_decided_once() -> None:
    decide = Decide()
    found = chosen(decide, FIRST_MATTERS, LAST_MATTERS, FIRST_MATTERS_MORE)
    assert decide.asked == [bits_of(**BY_FIRST), bits_of(**BY_LAST), bits_of(**PLAIN)]
    by_method = {choice.method: choice for choice in found}
    assert len(by_method) == 4
    one, other = by_method["first"], by_method["first more"]
    assert one.graph is other.graph
    assert one.decided is other.decided
    assert one.loss == other.loss
    assert (one.allocation.damage, other.allocation.damage) == (2, 3)


def test_outputs_are_compared_as_is_asked() -> None:
    found = chosen(Decide(), FIRST_MATTERS, LAST_MATTERS, loss=OutputLoss.NOISE)
    for choice in found:
        assert choice.loss == outputs_lose(choice.graph, choice.decided, JUDGING, OutputLoss.NOISE)


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_a_network_whose_loss_is_no_number_is_the_worst(broken: float, monkeypatch: pytest.MonkeyPatch) -> None:
    def lose(graph: Graph, decided: Quantization, *_: object) -> float:
        widths = {layer: decided.weights[map_named(subject(), layer).name].params.type.bits for layer in "ab"}
        return broken if widths["a"] == 8 else float(widths["b"] == 2)

    monkeypatch.setattr(choosing, "outputs_lose", lose)
    for scores in ((FIRST_MATTERS, LAST_MATTERS), (LAST_MATTERS, FIRST_MATTERS)):
        assert [choice.method for choice in chosen(Decide(), *scores)] == ["last", "uniform", "first"]


def test_choices_hold_the_network_of_their_bits() -> None:
    for choice in chosen(Decide(), FIRST_MATTERS, LAST_MATTERS):
        assert choice.graph.text() == assigned(subject().graph, choice.bits, placement_of).text()
        assert {name: weight.params.type.bits for name, weight in choice.decided.weights.items()} == {
            name: bits.weight for name, bits in choice.bits.items()
        }
        assert choice.loss == outputs_lose(choice.graph, choice.decided, JUDGING, OutputLoss.DIVERGENCE)


WHOLE = {WEIGHT_BITS: 8 * (63 + 35 + 20)}


@pytest.mark.parametrize(
    ("scores", "limits", "bits"),
    [
        ([FIRST_MATTERS], LIMIT, BY_FIRST),
        ([FIRST_MATTERS, LAST_MATTERS], WHOLE, dict.fromkeys("abc", Bits(8, 8))),
    ],
)
def test_one_candidate_is_not_measured(
    scores: list[Sensitivity],
    limits: Mapping[str, float],
    bits: Mapping[str, Bits],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def never(*_: object) -> float:
        raise AssertionError("it is measured")

    monkeypatch.setattr(choosing, "outputs_lose", never)
    decide = Decide()
    found = chosen(decide, *scores, limits=limits)
    assert decide.asked == [bits_of(**bits)]
    assert [choice.method for choice in found][: len(scores)] == [each.method for each in scores]
    assert {choice.loss for choice in found} == {None}


def test_uniform_bits_are_taken_where_scores_mislead(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are the widest that the limit allows; one score alone has no competitor."""

    def lose(graph: Graph, decided: Quantization, *_: object) -> float:
        return float(len({weight.params.type.bits for weight in decided.weights.values()}))

    monkeypatch.setattr(choosing, "outputs_lose", lose)
    best = chosen(Decide(), FIRST_MATTERS, LAST_MATTERS)[0]
    assert (best.method, best.loss, best.bits) == ("uniform", 1.0, bits_of(**PLAIN))
    assert best.allocation.use[WEIGHT_BITS] == 2 * (63 + 35 + 20)
    assert [choice.method for choice in chosen(Decide(), FIRST_MATTERS)] == ["first"]


def test_no_uniform_bits_fit() -> None:
    given = [replace(members()[0], override=Bits(8, 8)), *members()[1:]]
    options_ = {"judging": JUDGING, "loss": OutputLoss.DIVERGENCE, "progress": Silent()}
    use = lambda member, bits: {"narrow": float(bits.weight == 2), "wide": float(bits.weight == 8)}  # noqa: E731
    found = choose(
        given,
        [FIRST_MATTERS, LAST_MATTERS],
        CHOICES,
        {"narrow": 1.0, "wide": 2.0},
        use=use,
        decide=Decide(),
        **options_,  # type: ignore[arg-type]
    )
    assert {choice.method for choice in found} == {"first", "last"}


def test_what_the_rest_uses_counts() -> None:
    """It leaves eight bits for one map, which is not the first."""
    found = chosen(Decide(), score("any", a=5.0, b=2.0, c=1.0), rest={WEIGHT_BITS: 100.0, BOPS: 0.0})
    assert found[0].bits == bits_of(a=Bits(2, 8), b=Bits(8, 8), c=Bits(2, 8))
    assert found[0].allocation.use[WEIGHT_BITS] == 63 * 2 + 35 * 8 + 20 * 2 + 100


def test_other_uses_may_be_counted() -> None:
    def use(member: Member, bits: Bits) -> dict[str, float]:
        return {"layers of eight bits": float(bits.weight == 8), **use_of(member, bits)}

    found = chosen(Decide(), LAST_MATTERS, use=use, limits={"layers of eight bits": 1.0})
    assert found[0].bits == bits_of(a=Bits(2, 8), b=Bits(2, 8), c=Bits(8, 8))


def test_too_little_is_refused() -> None:
    decide = Decide()
    with pytest.raises(BudgetTooSmall, match="weight-bits"):
        chosen(decide, FIRST_MATTERS, limits={WEIGHT_BITS: 200.0})
    assert decide.asked == []
