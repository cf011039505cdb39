"""Every score by its name: what it must hold of any network, and which networks it refuses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from itertools import pairwise
from math import isfinite, log
from statistics import fmean
from typing import Any

import pytest
import torch
from small_subject import made, map_named, subject_of
from torch import Tensor, nn

from normfuse.errors import BadInput, UsageError
from normfuse.progress import Silent
from normfuse.quant.bits import Bits
from normfuse.quant.output_kind import OutputKind
from normfuse.quant.score_method import ScoreMethod, scores_called
from normfuse.sensitivity.curvature import curvature
from normfuse.sensitivity.gradient_error import gradient_error
from normfuse.sensitivity.methods import score, scores_of
from normfuse.sensitivity.output_loss import OutputLoss
from normfuse.sensitivity.sensitivity import Kind, Sensitivity
from normfuse.sensitivity.squared_errors import squared_errors
from normfuse.sensitivity.subject import Subject
from normfuse.sensitivity.traces import fisher_traces, hessian_traces
from normfuse.testing import seeded

X = torch.randn(5, 2, 7, 5, generator=seeded(0))
PARTS = made(conv=nn.Conv2d(2, 3, 3, stride=2), up=nn.Linear(18, 11), down=nn.Linear(11, 4))

MEASURED = [ScoreMethod.DIVERGENCE, ScoreMethod.NOISE]
NEED_CLASSES = [ScoreMethod.DIVERGENCE, ScoreMethod.FISHER, ScoreMethod.HESSIAN]
OTHERS = [each for each in ScoreMethod if each not in NEED_CLASSES]


def classes(m: Any, x: Tensor) -> Tensor:
    return m.down(m.up(m.conv(x).relu().flatten(1)).tanh())  # type: ignore[no-any-return]


def tokens(m: Any, x: Tensor) -> Tensor:
    return classes(m, x).unsqueeze(1)


@cache
def subject(weight_widths: tuple[int, ...] = (2, 4, 8), activation_widths: tuple[int, ...] = (3, 8)) -> Subject:
    widths = {"weight_widths": weight_widths, "activation_widths": activation_widths}
    return subject_of(classes, X, sizes=(3, 2), parts=PARTS, **widths)


@cache
def found(method: ScoreMethod) -> Sensitivity:
    return score(subject(), method)


@pytest.mark.parametrize("method", ScoreMethod)
def test_every_part_has_a_damage_at_every_width(method: ScoreMethod) -> None:
    each = found(method)
    assert each.method == method.value
    assert {name: list(row) for name, row in each.weights.items()} == {node.name: [2, 4, 8] for node in subject().maps}
    assert {name: list(row) for name, row in each.activations.items()} == {
        request.source.name: [3, 8] for request in subject().activations
    }
    rows = [row for kind in Kind for row in each.of(kind).values()]
    assert all(isfinite(amount) and amount >= 0 for row in rows for amount in row.values())
    assert all(row[min(row)] > 0 for row in rows)


def over_parts(table: Mapping[str, Mapping[int, float]], bits: int) -> float:
    return fmean(row[bits] for row in table.values())


@pytest.mark.parametrize("method", ScoreMethod)
def test_fewer_bits_cost_more_on_average(method: ScoreMethod) -> None:
    """An error is a quarter as large, at most, where codes have twice the bits."""
    each = found(method)
    for table, widths in ((each.weights, (2, 4, 8)), (each.activations, (3, 8))):
        amounts = [over_parts(table, bits) for bits in widths]
        assert all(more < fewer / 4 for fewer, more in pairwise(amounts))


@pytest.mark.parametrize("method", ScoreMethod)
def test_scores_are_repeatable(method: ScoreMethod) -> None:
    assert score(subject(), method) == found(method)


SEEDED = [ScoreMethod.CURVATURE, ScoreMethod.HESSIAN, ScoreMethod.RANDOM]


@pytest.mark.parametrize("method", ScoreMethod)
def test_some_follow_a_seed(method: ScoreMethod) -> None:
    assert (score(subject(), method, seed=1) != found(method)) is (method in SEEDED)


@pytest.mark.parametrize("method", NEED_CLASSES)
def test_what_needs_classes_is_refused_without(method: ScoreMethod) -> None:
    without = subject_of(tokens, X, parts=PARTS)
    with pytest.raises(UsageError, match=f"the score {method.value} needs class scores") as caught:
        score(without, method)
    assert "the score curvature or sqnr, which take any outputs" in str(caught.value)
    assert "[batch, classes]" in str(caught.value)
    with pytest.raises(UsageError, match="needs class scores"):
        scores_of(without, [method])


def test_scores_leave_out_what_the_network_does_not_allow() -> None:
    without = subject_of(tokens, X, parts=PARTS)
    scores = scores_of(without, [ScoreMethod.CURVATURE, ScoreMethod.DIVERGENCE, ScoreMethod.NOISE])
    assert [each.method for each in scores] == ["curvature", "sqnr"]


@pytest.mark.parametrize("method", OTHERS)
def test_others_take_any_outputs(method: ScoreMethod) -> None:
    each = score(subject_of(tokens, X, parts=PARTS), method)
    amounts = [amount for kind in Kind for row in each.of(kind).values() for amount in row.values()]
    assert len(amounts) == 3 * 3 + 2 * 2
    assert all(isfinite(amount) for amount in amounts)


class Table(nn.Module):
    """What a network has learned, no input: it is the same for all samples."""

    def __init__(self) -> None:
        super().__init__()
        self.row = nn.Parameter(torch.ones(1, 3))

    def forward(self) -> torch.Tensor:
        return self.row


def with_constants(m: Any, x: Tensor) -> Tensor:
    """A map reads what another makes of a table; where that is large, folding leaves both as they are."""
    return m.head(m.a(x.flatten(1)).tanh() * m.c(m.b(m.table()).tanh()))  # type: ignore[no-any-return]


@pytest.mark.parametrize("method", ScoreMethod)
def test_what_is_made_of_constants_is_scored(method: ScoreMethod) -> None:
    parts = made(a=nn.Linear(70, 7), b=nn.Linear(3, 2), c=nn.Linear(2, 7), head=nn.Linear(7, 4), table=Table())
    each = score(subject_of(with_constants, X, sizes=(3, 2), parts=parts), method)
    assert len(each.weights) == 3, "that of the table reads a constant and stays float"
    amounts = [amount for kind in Kind for row in each.of(kind).values() for amount in row.values()]
    assert all(isfinite(amount) and amount >= 0 for amount in amounts)
    has_relevance = method not in (ScoreMethod.RELEVANCE, ScoreMethod.RELEVANCE_ERROR)
    assert (list(each.weights.values())[1][2] > 0) is has_relevance


def test_what_outputs_are_said_to_be_decides() -> None:
    """Class scores are values, too: then what needs classes is refused or left out."""
    values = replace(subject(), outputs=OutputKind.VALUES)
    with pytest.raises(UsageError, match="needs class scores"):
        score(values, ScoreMethod.DIVERGENCE)
    assert [each.method for each in scores_of(values, list(scores_called("default")))] == ["curvature", "sqnr"]
    assert score(values, ScoreMethod.CURVATURE) == curvature(subject(), OutputLoss.NOISE, seed=0, progress=Silent())


def test_outputs_that_are_no_numbers_are_refused() -> None:
    """The largest floats are 3.4e38."""
    infinite = subject_of(lambda m, x: classes(m, x) * 1e38 * 1e3, X, parts=PARTS)
    with pytest.raises(BadInput, match=r"the score sqnr of .* is not finite") as caught:
        scores_of(infinite, [ScoreMethod.NOISE])
    assert "outputs on the calibration samples" in str(caught.value)


def test_outputs_without_features_are_scored() -> None:
    """A regression of one number, [samples]."""
    each = score(subject_of(lambda m, x: classes(m, x).mean(1), X, parts=PARTS), ScoreMethod.CURVATURE)
    assert all(amount > 0 for row in each.weights.values() for amount in row.values())


@pytest.mark.parametrize("method", ScoreMethod)
def test_integers_alone_are_refused(method: ScoreMethod) -> None:
    integers = subject_of(lambda m, x: classes(m, x).argmax(1), X, parts=PARTS)
    with pytest.raises(UsageError, match="no output of floating point") as caught:
        score(integers, method)
    assert "without its argmax" in str(caught.value)


@pytest.mark.parametrize("method", ScoreMethod)
def test_floats_as_activations_are_scored_by_weights_alone(method: ScoreMethod) -> None:
    each = score(subject((3, 8), ()), method)
    assert {name: list(row) for name, row in each.weights.items()} == {node.name: [3, 8] for node in subject().maps}
    assert each.activations == {}


def test_several_scores_are_those_alone_in_order() -> None:
    methods = [ScoreMethod.NOISE, ScoreMethod.RANDOM, ScoreMethod.DIVERGENCE, ScoreMethod.FISHER]
    assert scores_of(subject(), methods) == [found(each) for each in methods]


def test_measured_scores_share_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    runs, known = list[list[OutputLoss]](), [found(method) for method in MEASURED]

    def watch(_: Subject, losses: list[OutputLoss], **__: object) -> list[Sensitivity]:
        runs.append(list(losses))
        return known

    monkeypatch.setattr("normfuse.sensitivity.methods.one_at_a_time", watch)
    assert scores_of(subject(), [ScoreMethod.NOISE, ScoreMethod.DIVERGENCE]) == known[::-1]
    assert runs == [[OutputLoss.DIVERGENCE, OutputLoss.NOISE]]


GRADIENTS_AT = [((2, 4, 8), (3, 8), Bits(4, 8)), ((2, 5, 8), (3, 4), Bits(5, 4)), ((2, 3), (2, 3), Bits(3, 3))]


@pytest.mark.parametrize(("weights", "activations", "base"), GRADIENTS_AT)
def test_gradients_come_from_four_bits_or_the_fewest_above(
    weights: tuple[int, ...], activations: tuple[int, ...], base: Bits
) -> None:
    each = subject(weights, activations)
    expected = gradient_error(each, OutputLoss.DIVERGENCE, base=base, progress=Silent())
    assert score(each, ScoreMethod.GRADIENT_ERROR) == expected


@pytest.mark.parametrize("method", [ScoreMethod.FISHER, ScoreMethod.HESSIAN])
def test_traces_weigh_squares(method: ScoreMethod) -> None:
    """tr / elements * ||e||^2 / 2, of a Hessian only where it is positive."""
    is_fisher = method is ScoreMethod.FISHER
    traces = (
        fisher_traces(subject(), progress=Silent())
        if is_fisher
        else hessian_traces(subject(), seed=0, progress=Silent())
    )
    own = squared_errors(subject(), progress=Silent()).own
    sizes = {"conv": 54, "up": 198, "down": 44}
    for name, size in sizes.items():
        node = map_named(subject(), name).name
        for bits in (2, 4, 8):
            expected = max(traces.by_kind[Kind.WEIGHT][node] / size * own[Kind.WEIGHT][node][bits] / 2, 0)
            assert found(method).weights[node][bits] == pytest.approx(expected, rel=1e-12)


def test_random_importances_are_spread_over_two_decades() -> None:
    tables = [score(subject(), ScoreMethod.RANDOM, seed=seed) for seed in range(60)]
    rows = [row for each in tables for kind in Kind for row in each.of(kind).values()]
    assert all(row[8] == pytest.approx(row[min(row)] * 4.0 ** (min(row) - 8), rel=1e-12) for row in rows)
    importances = sorted(log(row[8] * 4.0**8, 100) for row in rows)
    assert 0 <= importances[0] < 0.05  # 300 of them, uniform from 0 to 1
    assert 0.95 < importances[-1] <= 1
    assert fmean(importances) == pytest.approx(0.5, abs=5 / (12 * len(importances)) ** 0.5)
