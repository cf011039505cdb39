"""Gradients of a quantized layer times rounding errors, and their curvature, written out in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from small_subject import EPS, activation_named, made, placed, scored, subject_of, weight_of
from torch import Tensor, nn
from torch.nn.functional import log_softmax

from normfuse.graph import capture
from normfuse.progress import Silent
from normfuse.quant import snap
from normfuse.quant.bits import Bits
from normfuse.sensitivity.gradient_error import gradient_error
from normfuse.sensitivity.output_loss import OutputLoss
from normfuse.sensitivity.sensitivity import Kind, Sensitivity
from normfuse.sensitivity.subject import Subject
from normfuse.testing import Small, seeded

X = torch.randn(5, 9, generator=seeded(0))
BASE = Bits(4, 3)


PARTS = made(a=nn.Linear(9, 4))


def linear() -> nn.Linear:
    part = PARTS["a"]
    assert isinstance(part, nn.Linear)
    return part


def layer(m: Any, x: Tensor) -> Tensor:
    out: Tensor = m.a(x.relu())
    return out


@cache
def subject(sizes: tuple[int, ...] = (3, 2)) -> Subject:
    return subject_of(layer, X, sizes=sizes, parts=PARTS)


@cache
def found(loss: OutputLoss, sizes: tuple[int, ...] = (3, 2)) -> Sensitivity:
    return gradient_error(subject(sizes), loss, base=BASE, progress=Silent())


def total(loss: OutputLoss, outputs: Tensor, wanted: Tensor) -> Tensor:
    """The loss of all samples."""
    if loss is OutputLoss.NOISE:
        return ((outputs - wanted).square().sum(1) / wanted.square().sum(1)).sum()
    log_p = log_softmax(wanted, 1)
    return (log_p.exp() * (log_p - log_softmax(outputs, 1))).sum()


@dataclass(frozen=True)
class Place:
    """The gradient at a place, [samples, features], and errors of it by bits."""

    gradient: Tensor
    errors: Callable[[int], Tensor]
    base: int

    def first(self, bits: int) -> float:
        return float((self.gradient * self.errors(bits)).sum().abs()) / len(X)

    @property
    def curvature(self) -> Tensor:
        """By least squares, feature by feature."""
        error = self.errors(self.base)
        products, squares = (self.gradient * error).sum(0), error.square().sum(0)
        return torch.where(squares > 0, products / squares, 0).clamp(min=0)

    def second(self, bits: int) -> float:
        return float((self.curvature * self.errors(bits).square()).sum()) / 2 / len(X)


@cache
def place(loss: OutputLoss, kind: Kind) -> Place:
    """All of the network: ``y = W relu(x) + b``, rounded and exact."""
    (node,), request = subject().maps, activation_named(subject(), "a")
    exact, bias = weight_of(subject(), node).detach().double(), linear().bias.detach().double()
    x = X.relu().double()

    def rounded(bits: int) -> Tensor:
        params = subject().params(request, bits)
        assert params is not None
        return snap(x, params)

    read, weight = rounded(BASE.activation), subject().weight(node, BASE.weight).values.double()
    outputs = (read @ weight.T + bias).requires_grad_()
    (gradient,) = torch.autograd.grad(total(loss, outputs, x @ exact.T + bias), outputs)
    if kind is Kind.WEIGHT:
        return Place(
            gradient, lambda bits: read @ (subject().weight(node, bits).values.double() - exact).T, BASE.weight
        )
    return Place(gradient @ weight, lambda bits: rounded(bits) - x, BASE.activation)


def amounts(score: Sensitivity, kind: Kind) -> dict[int, float]:
    (row,) = score.of(kind).values()
    return dict(row)


CASES = [(Kind.WEIGHT, 2), (Kind.WEIGHT, 4), (Kind.WEIGHT, 8), (Kind.ACTIVATION, 3), (Kind.ACTIVATION, 8)]


RELATIVE = 2 * 16 * EPS * 2 * 255
"""Half a step of 8-bit codes is 1/510 of what it is the error of, whose 16 roundings are relative to the largest."""


@pytest.mark.parametrize("loss", OutputLoss)
@pytest.mark.parametrize(("kind", "bits"), CASES)
def test_by_hand(kind: Kind, bits: int, loss: OutputLoss) -> None:
    at = place(loss, kind)
    size = float((at.gradient * at.errors(bits)).abs().sum()) / len(X) + at.second(bits)
    amount = amounts(found(loss), kind)[bits]
    assert amount == pytest.approx(at.first(bits) + at.second(bits), abs=RELATIVE * size)
    assert min(at.first(bits), at.second(bits)) > 2 * RELATIVE * size, "both terms show"


def test_some_curvature_is_negative_and_counts_as_none() -> None:
    assert not bool(place(OutputLoss.NOISE, Kind.ACTIVATION).curvature.all())
    assert bool(place(OutputLoss.NOISE, Kind.ACTIVATION).curvature.any())


def test_every_part_has_every_width() -> None:
    score = found(OutputLoss.NOISE)
    assert score.method == "gradient-error"
    assert list(amounts(score, Kind.WEIGHT)) == [2, 4, 8]
    assert list(amounts(score, Kind.ACTIVATION)) == [3, 8]


@pytest.mark.parametrize("loss", OutputLoss)
def test_chunks_make_no_difference(loss: OutputLoss) -> None:
    for kind in Kind:
        row = amounts(found(loss, (1, 4)), kind)
        assert row == pytest.approx(amounts(found(loss), kind), rel=RELATIVE)


TOKENS = torch.randn(5, 3, 9, generator=seeded(1))


@pytest.mark.parametrize("free", [(0,), (0, 1)])
def test_axes_of_free_sizes_share_a_curvature(free: tuple[int, ...]) -> None:
    """The samples do, and tokens where there may be any number of them."""
    model = Small(layer, **PARTS)
    axes = {axis: torch.export.Dim(name) for axis, name in zip(free, ("batch", "length"), strict=False)}
    graph = placed(capture(torch.export.export(model, (TOKENS,), dynamic_shapes={"x": axes}), None))
    tokens = scored(graph, TOKENS, sizes=(3, 2), widths=((4,), (3, 8)))
    (amount,) = amounts(gradient_error(tokens, OutputLoss.NOISE, base=BASE, progress=Silent()), Kind.WEIGHT).values()
    (node,), request = tokens.maps, activation_named(tokens, "a")
    params = tokens.params(request, BASE.activation)
    assert params is not None
    exact, rounded = weight_of(tokens, node).detach().double(), tokens.weight(node, 4).values.double()
    x, bias = TOKENS.relu().double(), linear().bias.detach().double()
    read, wanted = snap(x, params), x @ exact.T + bias
    gradient = 2 * (read @ rounded.T + bias - wanted) / wanted.square().sum((1, 2), keepdim=True)
    error = read @ (rounded - exact).T
    products, squares = (gradient * error).sum(free), error.square().sum(free)
    curvature = (products / squares).clamp(min=0)
    expected = products.sum().abs() + (curvature * squares).sum() / 2
    assert amount == pytest.approx(float(expected) / len(TOKENS), rel=RELATIVE)
