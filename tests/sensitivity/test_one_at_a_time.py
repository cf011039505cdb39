"""One part quantized alone costs what the whole network says when it is run with that part quantized."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from functools import cache
from math import sqrt
from typing import Any

import pytest
import torch
from small_subject import activation_named, made, map_named, subject_of, weight_of
from torch import Tensor, nn
from torch.nn.functional import log_softmax

from normfuse.graph.segments import segments
from normfuse.precision.decision import Quantization
from normfuse.precision.simulation import Simulation
from normfuse.progress import Silent
from normfuse.quant import ActivationParams, snap
from normfuse.quant.bits import Bits
from normfuse.sensitivity.one_at_a_time import one_at_a_time
from normfuse.sensitivity.output_loss import OutputLoss
from normfuse.sensitivity.sensitivity import Kind, Sensitivity
from normfuse.sensitivity.subject import Subject
from normfuse.sensitivity.watched_run import NOTHING
from normfuse.testing import seeded

X = torch.randn(5, 2, 7, 5, generator=seeded(0))
PARTS = made(
    conv=nn.Conv2d(2, 3, 3, stride=2),
    up=nn.Linear(18, 11),
    gate=nn.Linear(18, 11, bias=False),
    down=nn.Linear(11, 18),
    head=nn.Linear(18, 4),
)
READERS = {"stem": "up", "product": "down", "sum": "head"}
"""The activations, and a map that reads each."""

Tap = Callable[[str, Tensor], Tensor]


def network(m: Any, x: Tensor, tap: Tap) -> Tensor:
    """Two maps read the stem, the next their product, the last the sum with the stem."""
    y = m["conv"](x).relu().flatten(1)
    read = tap("stem", y)
    product = tap("product", m["up"](read) * m["gate"](read).sigmoid())
    out: Tensor = m["head"](tap("sum", y + m["down"](product)))
    return out


def as_it_is(_: str, x: Tensor) -> Tensor:
    return x


@cache
def subject(sizes: tuple[int, ...] = (3, 2)) -> Subject:
    return subject_of(lambda m, x: network(vars(m)["_modules"], x, as_it_is), X, sizes=sizes, parts=PARTS)


@cache
def found(sizes: tuple[int, ...] = (3, 2)) -> dict[OutputLoss, Sensitivity]:
    losses = list(OutputLoss)
    return dict(zip(losses, one_at_a_time(subject(sizes), losses, progress=Silent()), strict=True))


def loss_of(loss: OutputLoss, outputs: Tensor, exact: Tensor) -> float:
    """The mean over samples, written out."""
    if loss is OutputLoss.NOISE:
        return float(((outputs - exact).square().sum(1) / exact.square().sum(1)).mean())
    log_p, log_q = log_softmax(exact, 1), log_softmax(outputs, 1)
    return float((log_p.exp() * (log_p - log_q)).sum(1).mean())


@torch.no_grad()
def by_hand(loss: OutputLoss, *, weight: tuple[str, int] | None = None, at: str = "", bits: int = 0) -> float:
    """What one weight, or one activation, costs: float64, all of the network, all samples at once."""
    wide = {name: deepcopy(part).double() for name, part in PARTS.items()}
    exact = network(wide, X.double(), as_it_is)
    if weight is not None:
        name, width = weight
        rounded = subject().weight(map_named(subject(), name), width)
        wide[name].weight = nn.Parameter(rounded.values.double())
    params: ActivationParams | None = None
    if at:
        params = subject().params(activation_named(subject(), READERS[at]), bits)
        assert params is not None

    def tap(name: str, x: Tensor) -> Tensor:
        return x if name != at or params is None else snap(x, params)

    return loss_of(loss, network(wide, X.double(), tap), exact)


@cache
def rounding() -> float:
    """What the float network errs by against float64: the root of the mean over samples."""
    wide = {name: deepcopy(part).double() for name, part in PARTS.items()}
    exact = network(wide, X.double(), as_it_is).detach()
    return float((subject().graph.run(X)[0] - exact).square().sum(1).mean().sqrt())


def assert_same(amount: float, expected: float) -> None:
    """Roots of losses are norms of what outputs err by (of half of it, or relative to outputs that are longer than 1).

    They differ by what float32 adds to both outputs, exact and quantized, on either side.
    """
    tolerance = 4 * rounding()
    assert sqrt(amount) == pytest.approx(sqrt(expected), abs=tolerance)
    assert sqrt(expected) > 10 * tolerance


@pytest.mark.parametrize("loss", OutputLoss)
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("name", PARTS)
def test_weights(name: str, bits: int, loss: OutputLoss) -> None:
    amount = found()[loss].weights[map_named(subject(), name).name][bits]
    assert_same(amount, by_hand(loss, weight=(name, bits)))


@pytest.mark.parametrize("loss", OutputLoss)
@pytest.mark.parametrize("bits", [3, 8])
@pytest.mark.parametrize("name", READERS)
def test_activations(name: str, bits: int, loss: OutputLoss) -> None:
    amount = found()[loss].activations[activation_named(subject(), READERS[name]).source.name][bits]
    assert_same(amount, by_hand(loss, at=name, bits=bits))


def test_the_network_has_places_to_cut() -> None:
    """(So that values are kept in front of some segments, and others stand behind.)"""
    maps = set(subject().maps)
    assert len(segments(subject().graph, wanted=lambda node: node in maps)) >= 3


def test_every_part_has_every_width_and_scores_have_names() -> None:
    assert {loss: each.method for loss, each in found().items()} == {
        OutputLoss.DIVERGENCE: "kl",
        OutputLoss.NOISE: "sqnr",
    }
    for each in found().values():
        assert {name: list(row) for name, row in each.weights.items()} == {
            node.name: [2, 4, 8] for node in subject().maps
        }
        assert {name: list(row) for name, row in each.activations.items()} == {
            request.source.name: [3, 8] for request in subject().activations
        }


@pytest.mark.parametrize("loss", OutputLoss)
def test_losses_of_one_run_are_those_of_runs_of_their_own(loss: OutputLoss) -> None:
    assert one_at_a_time(subject(), [loss], progress=Silent()) == [found()[loss]]


@pytest.mark.parametrize("loss", OutputLoss)
def test_chunks_make_no_difference(loss: OutputLoss) -> None:
    one, other = found()[loss], found((1, 1, 3))[loss]
    for kind in Kind:
        for name, row in one.of(kind).items():
            for bits, amount in row.items():
                assert_same(other.of(kind)[name][bits], amount)


def whole(decided: Quantization) -> Tensor:
    (outputs,) = subject().graph.run_as([X], Simulation(decided))
    return outputs.detach().double()


@pytest.mark.parametrize("loss", OutputLoss)
def test_around_a_base_one_part_changes(loss: OutputLoss) -> None:
    """All parts have 4 or 8 bits but the one that is tried; the loss is what the outputs lose against float."""
    base = subject().uniform(Bits(4, 8))
    (score,) = one_at_a_time(subject(), [loss], base=base, progress=Silent())
    exact = subject().graph.run(X)[0].double()
    for node in subject().maps:
        for bits in subject().weight_widths:
            decided = base.changed(weights={node.name: subject().weight(node, bits)})
            assert_same(score.weights[node.name][bits], loss_of(loss, whole(decided), exact))
    for request in subject().activations:
        for bits in subject().activation_widths:
            params = subject().params(request, bits)
            assert params is not None
            decided = base.changed(activations={request.source.name: params})
            assert_same(score.activations[request.source.name][bits], loss_of(loss, whole(decided), exact))
    alike = [score.weights[node.name][4] for node in subject().maps]
    assert alike == [alike[0]] * len(alike), "a part that gets what it has changes nothing"


def test_nothing_is_the_default_base() -> None:
    (score,) = one_at_a_time(subject(), [OutputLoss.NOISE], base=NOTHING, progress=Silent())
    assert score == found()[OutputLoss.NOISE]


def test_all_floating_point_outputs_count() -> None:
    """The second output is what the first map writes, handed on from in front of a cut; the third is of integers."""
    parts, x = made(a=nn.Linear(9, 5), b=nn.Linear(5, 3)), X.flatten(1)[:, :9]
    both = subject_of(lambda m, x: (m.b((y := m.a(x)).relu()), y, y.argmax(1)), x, parts=parts)
    alone = subject_of(lambda m, x: m.b(m.a(x).relu()), x, parts=parts)
    one, other = (one_at_a_time(each, [OutputLoss.NOISE], progress=Silent())[0] for each in (both, alone))
    first, second = (map_named(both, name) for name in "ab")
    change = both.weight(first, 2).values.double() - weight_of(both, first).double()
    exact = parts["a"](x).detach().double()
    direct = ((x.double() @ change.T).square().sum(1) / exact.square().sum(1)).mean()
    assert one.weights[first.name][2] == pytest.approx(other.weights[first.name][2] + float(direct), rel=1e-4)
    assert one.weights[second.name] == pytest.approx(other.weights[second.name], rel=1e-4)
