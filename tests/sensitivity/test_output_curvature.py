"""Errors followed to the outputs by gradients: against Jacobians written out, and against what is measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial, reduce
from math import exp
from statistics import fmean, stdev
from typing import Any

import pytest
import torch
from small_subject import EPS, activation_named, made, map_named, subject_of, weight_of
from torch import Tensor, nn
from torch.autograd.functional import jacobian

from normfuse.precision.decision import Quantization
from normfuse.precision.simulation import Simulation
from normfuse.progress import Silent
from normfuse.quant import snap
from normfuse.quant.bits import Bits
from normfuse.sensitivity.curvature import curvature
from normfuse.sensitivity.one_at_a_time import one_at_a_time
from normfuse.sensitivity.output_loss import OutputLoss
from normfuse.sensitivity.sensitivity import Kind, Sensitivity
from normfuse.sensitivity.subject import Subject
from normfuse.sensitivity.watched_run import NOTHING
from normfuse.testing import seeded

X = torch.randn(5, 6, 9, generator=seeded(0))
PARTS = made(a=nn.Linear(9, 7), b=nn.Linear(7, 11), c=nn.Linear(11, 3))
CLASSES = 3


class AllDirections:
    """In the place of random probes: columns of S in turn, so large that their mean has the curvature exactly."""

    def __init__(self, loss: OutputLoss) -> None:
        self.loss, self.column = loss, 0

    def __call__(self, wanted: Sequence[Tensor], _: torch.Generator) -> list[Tensor]:
        (scores,) = wanted
        columns = [root(self.loss, row.double())[:, self.column % CLASSES] for row in scores]
        self.column += 1
        return [torch.stack(columns).to(scores.dtype) * CLASSES**0.5]


def root(loss: OutputLoss, scores: Tensor) -> Tensor:
    """S of one sample, with S S^T the second derivatives of its loss."""
    if loss is OutputLoss.NOISE:
        return torch.eye(CLASSES, dtype=torch.float64) * (2 / scores.square().sum()).sqrt()
    p = scores.softmax(0)
    return torch.diag(p.sqrt()) - p.outer(p.sqrt())


def exact(subject: Subject, loss: OutputLoss) -> Sensitivity:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OutputLoss, "probe", AllDirections(loss))
        return curvature(subject, loss, seed=0, probes=CLASSES, progress=Silent())


def network(m: Any, x: Tensor) -> Tensor:
    """Tokens whose features are mixed, then their mean."""
    out: Tensor = m.c(m.b(m.a(x).tanh()).sigmoid().mean(1))
    return out


@cache
def subject(sizes: tuple[int, ...] = (3, 2)) -> Subject:
    return subject_of(network, X, sizes=sizes, parts=PARTS)


def linear(name: str, x: Tensor) -> Tensor:
    """A map in float64."""
    part = PARTS[name]
    assert isinstance(part, nn.Linear)
    return nn.functional.linear(x, part.weight.detach().double(), part.bias.detach().double())


STEPS: list[tuple[str, Callable[[Tensor], Tensor]]] = [
    ("to a", partial(linear, "a")),
    ("a", torch.tanh),
    ("to b", partial(linear, "b")),
    ("b", lambda x: x.sigmoid().mean(-2)),
    ("to c", partial(linear, "c")),
    ("c", lambda x: x),
]
"""What the network makes of what a map reads ("to a"), and of what it writes ("a")."""

NAMES = [name for name, _ in STEPS]


def through(steps: Sequence[tuple[str, Callable[[Tensor], Tensor]]], x: Tensor) -> Tensor:
    return reduce(lambda found, step: step[1](found), steps, x)


def second_order(loss: OutputLoss, name: str, errors: Tensor) -> float:
    """``e^T J^T S S^T J e / 2``, the mean over samples, with J of all that is behind a place written out."""
    at, total = NAMES.index(name), 0.0
    for x, error in zip(through(STEPS[:at], X.double()), errors, strict=True):
        J = jacobian(partial(through, STEPS[at:]), x).reshape(CLASSES, -1)  # type: ignore[no-untyped-call]
        S = root(loss, through(STEPS[at:], x))
        total += float((S.T @ J @ error.reshape(-1)).square().sum()) / 2 / len(X)
    return total


def read_by(name: str) -> Tensor:
    return through(STEPS[: NAMES.index(f"to {name}")], X.double())


RELATIVE = 2 * 2 * 16 * EPS * 2 * 255
"""Half a step of 8-bit codes is 1/510 of what it is the error of, whose 16 roundings are relative to the largest; and
as much again of the gradients, whose products are squared."""


@pytest.mark.parametrize("loss", OutputLoss)
@pytest.mark.parametrize("name", PARTS)
def test_weights_to_second_order(name: str, loss: OutputLoss) -> None:
    found, node = exact(subject(), loss).weights, map_named(subject(), name)
    for bits in (2, 4, 8):
        difference = subject().weight(node, bits).values.double() - weight_of(subject(), node).double()
        expected = second_order(loss, name, read_by(name) @ difference.T)
        assert found[node.name][bits] == pytest.approx(expected, rel=RELATIVE)


@pytest.mark.parametrize("loss", OutputLoss)
@pytest.mark.parametrize("name", ["b", "c"])
def test_activations_to_second_order(name: str, loss: OutputLoss) -> None:
    found, request = exact(subject(), loss).activations, activation_named(subject(), name)
    for bits in (3, 8):
        params = subject().params(request, bits)
        assert params is not None
        error = snap(read_by(name), params) - read_by(name)
        expected = second_order(loss, f"to {name}", error)
        assert found[request.source.name][bits] == pytest.approx(expected, rel=RELATIVE)


def test_every_part_has_every_width() -> None:
    found = curvature(subject(), OutputLoss.NOISE, seed=0, progress=Silent())
    assert found.method == "curvature"
    assert {name: list(row) for name, row in found.weights.items()} == {node.name: [2, 4, 8] for node in subject().maps}
    assert {name: list(row) for name, row in found.activations.items()} == {
        request.source.name: [3, 8] for request in subject().activations
    }


@pytest.mark.parametrize("loss", OutputLoss)
def test_samples_add_up_whatever_the_chunks(loss: OutputLoss) -> None:
    one, *others = (exact(subject(sizes), loss) for sizes in ((3, 2), (5,), (1, 1, 3)))
    for other in others:
        for kind in Kind:
            for name, row in one.of(kind).items():
                assert other.of(kind)[name] == pytest.approx(row, rel=RELATIVE)


def met(found: Sequence[float], expected: float) -> bool:
    """Whether the mean of 12 runs is where one in a thousand is not (Student's distribution)."""
    deviation = stdev(found) / len(found) ** 0.5
    return bool(abs(fmean(found) - expected) < 4.5 * deviation < 0.5 * expected)


@pytest.mark.parametrize("loss", OutputLoss)
def test_random_probes_mean_the_same(loss: OutputLoss) -> None:
    """Of other seeds, in other chunks."""
    expected = exact(subject(), loss)
    runs = [curvature(subject((1, 4)), loss, seed=seed, probes=24, progress=Silent()) for seed in range(12)]
    for kind in Kind:
        for name, row in expected.of(kind).items():
            for bits, amount in row.items():
                assert met([run.of(kind)[name][bits] for run in runs], amount)


def test_the_seed_decides() -> None:
    one, same, other = (curvature(subject(), OutputLoss.NOISE, seed=seed, progress=Silent()) for seed in (4, 4, 5))
    assert one == same
    assert one != other


def test_every_chunk_has_probes_of_its_own() -> None:
    """The same samples twice are another estimate than once; so they are under the next seed."""
    once = subject((5,))
    twice = replace(once, chunks=[*once.chunks, *once.chunks])
    runs = [
        curvature(each, OutputLoss.NOISE, seed=seed, progress=Silent()) for each in (once, twice) for seed in (0, 1)
    ]
    amounts = [next(iter(run.weights.values()))[2] for run in runs]
    assert len(set(amounts)) == 4
    assert amounts[3] != (amounts[0] + amounts[2]) / 2


def linear_network(m: Any, x: Tensor) -> Tensor:
    out: Tensor = m.c(m.b(m.a(x)).mean(1))
    return out


def test_of_a_linear_network_it_is_the_noise_that_is_measured() -> None:
    """The relative squared error is a quadratic of the outputs' error, and that a linear map of any error."""
    subject = subject_of(linear_network, X, sizes=(3, 2), parts=PARTS)
    found = exact(subject, OutputLoss.NOISE)
    (measured,) = one_at_a_time(subject, [OutputLoss.NOISE], progress=Silent())
    for kind in Kind:
        for name, row in measured.of(kind).items():
            assert found.of(kind)[name] == pytest.approx(row, rel=RELATIVE)


@torch.no_grad()
def spread(subject: Subject, decided: Quantization) -> float:
    """The largest difference of what two scores of a sample move by."""
    (outputs,) = subject.graph.run_as([X], Simulation(decided))
    moved = outputs - subject.graph.run(X)[0]
    return float((moved.amax(1) - moved.amin(1)).max())


def test_of_a_linear_network_it_is_nearly_the_divergence_that_is_measured() -> None:
    """Scores that move by t * d have the divergence K(t), whose second derivative is a variance of d, V(t).

    With r, the spread of d: the third is at most r V(t), and V(t) at most e^r V(0). So K(1) = V(0) / 2 but for
    r e^r V(0) / 6.
    """
    widths = (2, 3, 5)
    subject = subject_of(linear_network, X, weight_widths=widths, activation_widths=widths, parts=PARTS)
    found = exact(subject, OutputLoss.DIVERGENCE)
    (measured,) = one_at_a_time(subject, [OutputLoss.DIVERGENCE], progress=Silent())
    for bits in widths:
        whole = subject.uniform(Bits(bits, bits))
        parts = [(Kind.WEIGHT, name, NOTHING.changed(weights={name: each})) for name, each in whole.weights.items()]
        parts += [
            (Kind.ACTIVATION, name, NOTHING.changed(activations={name: each}))
            for name, each in whole.activations.items()
        ]
        for kind, name, decided in parts:
            r = spread(subject, decided)
            assert measured.of(kind)[name][bits] == pytest.approx(found.of(kind)[name][bits], rel=r * exp(r) / 3)
            assert bits < 5 or r < 0.15


def tokens_first(m: Any, x: Tensor) -> Tensor:
    out: Tensor = m.c(m.b(m.a(x).permute(1, 0, 2).tanh()).sigmoid().mean(0))
    return out


def joined(m: Any, x: Tensor) -> Tensor:
    """Tokens of all samples along one axis."""
    out: Tensor = m.c(m.b(m.a(x).reshape(-1, 7).tanh()).sigmoid().view(-1, 6, 11).mean(1))
    return out


def side_by_side(m: Any, x: Tensor) -> Tensor:
    """Twice all samples along one axis: the shapes do not tell which are whose."""
    y = m.a(x).tanh()
    out: Tensor = m.c(m.b(torch.cat([y * 2, y], 0).chunk(2, 0)[1]).sigmoid().mean(1))
    return out


@pytest.mark.parametrize("loss", OutputLoss)
@pytest.mark.parametrize("function", [tokens_first, joined, side_by_side])
def test_samples_may_stand_anywhere(function: Callable[[Any, Tensor], Tensor], loss: OutputLoss) -> None:
    found, expected = exact(subject_of(function, X, sizes=(3, 2), parts=PARTS), loss), exact(subject(), loss)
    for kind in Kind:
        for row, wanted in zip(found.of(kind).values(), expected.of(kind).values(), strict=True):
            assert row == pytest.approx(wanted, rel=RELATIVE)


class Scale(nn.Module):
    """A table, which is the same for all samples."""

    def __init__(self) -> None:
        super().__init__()
        self.row = nn.Parameter(torch.ones(1, 4))

    def forward(self) -> Tensor:
        return self.row


def scaled(m: Any, x: Tensor) -> Tensor:
    """Linear in what the last map makes of the table."""
    return m.c(m.a(x).mean(1) * m.scale(m.last(m.table()).tanh()))  # type: ignore[no-any-return]


def test_errors_of_what_all_samples_share() -> None:
    """Of 5 samples in chunks of 4 and one; the noise is measured, and a quadratic of such an error."""
    parts = made(a=nn.Linear(9, 7), last=nn.Linear(4, 2), scale=nn.Linear(2, 7), c=nn.Linear(7, CLASSES), table=Scale())
    subject = subject_of(scaled, X, sizes=(4, 1), parts=parts)
    (measured,) = one_at_a_time(subject, [OutputLoss.NOISE], progress=Silent())
    runs = [curvature(subject, OutputLoss.NOISE, seed=seed, probes=48, progress=Silent()) for seed in range(12)]
    node, request = map_named(subject, "scale"), activation_named(subject, "scale")
    for kind, name in ((Kind.WEIGHT, node.name), (Kind.ACTIVATION, request.source.name)):
        for bits, amount in measured.of(kind)[name].items():
            assert met([run.of(kind)[name][bits] for run in runs], amount)


def test_samples_of_a_fixed_batch_are_not_told_apart() -> None:
    """They have probes of their own, so that products of two samples' errors are 0 on average."""
    fixed = subject_of(lambda m, x: network(m, x.reshape(5, 6, 9)), X, parts=PARTS)
    assert not fixed.graph.has_dynamic_batch
    runs = [curvature(fixed, OutputLoss.NOISE, seed=seed, probes=48, progress=Silent()) for seed in range(12)]
    for name, row in exact(subject(), OutputLoss.NOISE).weights.items():
        for bits, amount in row.items():
            assert met([run.weights[name][bits] for run in runs], amount)
