"""Shares of the relevance by hand, and what scores make of them."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from small_subject import EPS, activation_named, layer, made, map_named, subject_of, tensor
from torch import Tensor, nn

from normfuse.progress import Silent
from normfuse.quant.output_kind import OutputKind
from normfuse.sensitivity.contribution import contributions, relevance_score, relevance_times_error
from normfuse.sensitivity.relevance import relevance
from normfuse.sensitivity.sensitivity import Kind
from normfuse.sensitivity.squared_errors import squared_errors
from normfuse.sensitivity.subject import Subject
from normfuse.sensitivity.targets import magnitude_target
from normfuse.testing import seeded

X = tensor([1.0, 1.0], [1.0, 3.0], [2.0, 1.0])


def function(m: Any, x: Tensor) -> Tensor:
    h = m.first(x).relu()
    return m.a(h) + m.b(h)  # type: ignore[no-any-return]


@cache
def branches() -> Subject:
    """The scores are 3 h_0 + h_0, and h_1 + h_1.

    So the first class of two samples has 3/4 by way of a and 1/4 by way of b, the second of the other one a half each.
    All of it has come through the first map.
    """
    parts: dict[str, nn.Module] = {
        "first": layer([1.0, 0.0], [0.0, 1.0]),
        "a": layer([3.0, 0.0], [0.0, 1.0]),
        "b": layer([1.0, 0.0], [0.0, 1.0]),
    }
    return subject_of(function, X, sizes=(1, 2), parts=parts)


SHARES = {"first": 1 / 2, "a": (3 / 8 + 1 / 4 + 3 / 8) / 3, "b": (1 / 8 + 1 / 4 + 1 / 8) / 3}


def test_shares_by_hand() -> None:
    share, facts = contributions(branches(), progress=Silent())
    expected = {map_named(branches(), name).name: amount for name, amount in SHARES.items()}
    assert share == pytest.approx(expected, rel=16 * EPS)
    assert facts == pytest.approx({"conserved": 1, "absorbed": 0, "without_rule": 0}, abs=16 * EPS)


def test_a_layer_counts_by_its_share_and_the_power_of_the_noise() -> None:
    """16^-1, 256^-1 ... of 2, 4 ... bits; what a and b read has the mean of their shares."""
    score = relevance_score(branches(), progress=Silent())
    assert score.method == "lrp"
    assert score.facts == pytest.approx({"conserved": 1, "absorbed": 0, "without_rule": 0}, abs=16 * EPS)
    for name, share in SHARES.items():
        row = score.weights[map_named(branches(), name).name]
        assert row == pytest.approx({2: share / 16, 4: share / 256, 8: share / 65536}, rel=16 * EPS)
    (request,) = branches().activations
    both = (SHARES["a"] + SHARES["b"]) / 2
    assert score.activations.keys() == {request.source.name}
    assert score.activations[request.source.name] == pytest.approx({3: both / 64, 8: both / 65536}, rel=16 * EPS)


CONV = made(conv=nn.Conv2d(2, 3, 3, stride=2), up=nn.Linear(18, 11), down=nn.Linear(11, 18), head=nn.Linear(18, 4))
IMAGES = torch.randn(5, 2, 7, 5, generator=seeded(0))


def residual(m: Any, x: Tensor) -> Tensor:
    y = m.conv(x).relu().flatten(1)
    return m.head(y + m.down(m.up(y).relu()))  # type: ignore[no-any-return]


@cache
def network(sizes: tuple[int, ...] = (3, 2)) -> Subject:
    return subject_of(residual, IMAGES, sizes=sizes, parts=CONV)


def shares_of(subject: Subject, *inputs: Tensor) -> Tensor:
    """Of samples that are run at once."""
    found = relevance(subject.graph, inputs)
    sums = torch.stack([found.absolute[node].sum() for node in subject.maps])
    return sums / sums.sum()


def test_shares_are_taken_sample_by_sample() -> None:
    share, facts = contributions(network(), progress=Silent())
    assert sum(share.values()) == pytest.approx(1, rel=1e-12)
    alone = torch.stack([shares_of(network(), IMAGES[at : at + 1]) for at in range(len(IMAGES))])
    expected = dict(zip((node.name for node in network().maps), alone.mean(dim=0).tolist(), strict=True))
    # Relevance is divided by sums whose terms cancel: some digits go.
    assert share == pytest.approx(expected, rel=1e3 * EPS)
    assert float(alone.std(dim=0).max()) > 0.01, "samples differ"
    kept = [float(relevance(network().graph, [x[None]]).conserved) for x in IMAGES]
    assert facts["conserved"] == pytest.approx(sum(kept) / len(kept), rel=1e3 * EPS)
    assert facts["absorbed"] == 0


def test_chunks_make_no_difference() -> None:
    one, other = (contributions(network(sizes), progress=Silent())[0] for sizes in ((3, 2), (1, 4)))
    assert one == pytest.approx(other, rel=1e3 * EPS)


def test_samples_of_a_fixed_batch_have_one_share_and_count_as_many() -> None:
    """Two chunks of three each: all of a chunk is one sample."""
    x = torch.cat([IMAGES, IMAGES[:1] * 2])
    fixed = subject_of(lambda m, x: residual(m, x.reshape(3, 2, 7, 5)), x[:3], sizes=(3,), parts=CONV)
    assert not fixed.graph.has_dynamic_batch
    chunks = [[x[:3]], [x[3:]]]
    both = Subject(
        graph=fixed.graph,
        chunks=chunks,
        placement_of=fixed.placement_of,
        weight_widths=(4,),
        activation_widths=(8,),
        ranges=fixed.ranges,
    )
    share, facts = contributions(both, progress=Silent())
    expected = (shares_of(both, x[:3]) + shares_of(both, x[3:])) / 2
    assert list(share.values()) == pytest.approx(expected.tolist(), rel=16 * EPS)
    kept = [float(relevance(both.graph, chunk).conserved) for chunk in chunks]
    assert facts["conserved"] == pytest.approx(sum(kept) / 2, rel=16 * EPS)


def test_share_times_relative_error() -> None:
    share, facts = contributions(network(), progress=Silent())
    relative = squared_errors(network(), progress=Silent()).relative
    score = relevance_times_error(network(), progress=Silent())
    assert score.method == "lrp-error"
    assert score.facts == facts
    for node in network().maps:
        expected = {bits: share[node.name] * error for bits, error in relative[Kind.WEIGHT][node.name].items()}
        assert score.weights[node.name] == pytest.approx(expected, rel=1e-12)
        assert list(expected) == [2, 4, 8]
    for name in ("up", "down", "head"):
        source, node = activation_named(network(), name).source.name, map_named(network(), name)
        expected = {bits: share[node.name] * error for bits, error in relative[Kind.ACTIVATION][source].items()}
        assert score.activations[source] == pytest.approx(expected, rel=1e-12)
        assert list(expected) == [3, 8]


def test_outputs_that_are_said_to_be_values_are_explained_as_such() -> None:
    """As classes only the predicted one is explained; as values all outputs are, by their magnitudes."""
    classes = network()
    values = replace(classes, outputs=OutputKind.VALUES)
    share, _ = contributions(values, progress=Silent())
    expected = [relevance(values.graph, chunk, target=magnitude_target) for chunk in values.chunks]
    found = torch.cat([torch.stack([each.absolute[node] for node in values.maps]) for each in expected], dim=1)
    assert list(share.values()) == pytest.approx((found / found.sum(0)).mean(1).tolist(), rel=16 * EPS)
    assert share != contributions(classes, progress=Silent())[0]


def test_operators_without_a_rule_are_counted() -> None:
    parts = {"up": nn.Linear(2, 4), "head": nn.Linear(4, 3)}
    subject = subject_of(lambda m, x: m.head(m.up(x).cumsum(1)), X, parts=parts)
    assert relevance_score(subject, progress=Silent()).facts["without_rule"] == 1
