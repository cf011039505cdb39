"""Squares of rounding errors, of their own and beside what maps write, by hand in float64."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from small_subject import EPS, activation_named, layer, made, map_named, subject_of, tensor, weight_of
from torch import Tensor, nn

from normfuse.progress import Silent
from normfuse.quant import snap
from normfuse.sensitivity.sensitivity import Kind
from normfuse.sensitivity.squared_errors import SquaredErrors, squared_errors, weighted_by_trace
from normfuse.sensitivity.subject import Subject
from normfuse.testing import seeded

X = torch.randn(5, 9, generator=seeded(0))
PARTS = made(a=nn.Linear(9, 7), b=nn.Linear(7, 11), c=nn.Linear(7, 4), d=nn.Linear(15, 3))


def function(m: Callable[..., Tensor], x: Tensor) -> Tensor:
    y = m.a(x).relu()  # type: ignore[attr-defined]
    return m.d(torch.cat([m.b(y), m.c(y)], 1).tanh())  # type: ignore[attr-defined, no-any-return]


@cache
def subject(sizes: tuple[int, ...] = (5,)) -> Subject:
    return subject_of(function, X, sizes=sizes, parts=PARTS)


@cache
def found(sizes: tuple[int, ...] = (5,)) -> SquaredErrors:
    return squared_errors(subject(sizes), progress=Silent())


RELATIVE = 64 * EPS
"""Squares of sums of at most 15 products, over such squares."""

OF_CODES = 2 * 16 * EPS * 2 * 255
"""Half a step of 8-bit codes is 1/510 of what it is the error of, whose 16 roundings are relative to the largest."""


def square(x: Tensor) -> float:
    return float(x.double().square().sum())


@torch.no_grad()
def read_by(name: str) -> Tensor:
    """What a map reads of all samples."""
    y = PARTS["a"](X).relu()
    read: dict[str, Tensor] = {"b": y, "c": y, "d": torch.cat([PARTS["b"](y), PARTS["c"](y)], 1).tanh()}
    return read.get(name, X)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("name", "abcd")
def test_weights(name: str, bits: int) -> None:
    node = map_named(subject(), name)
    exact, rounded = weight_of(subject(), node).double(), subject().weight(node, bits).values.double()
    assert found().own[Kind.WEIGHT][node.name][bits] == pytest.approx(square(rounded - exact), rel=RELATIVE)
    x = read_by(name).double()
    expected = square(F.linear(x, rounded - exact)) / square(F.linear(x, exact))
    assert found().relative[Kind.WEIGHT][node.name][bits] == pytest.approx(expected, rel=RELATIVE)


@pytest.mark.parametrize("bits", [3, 8])
@pytest.mark.parametrize("readers", ["bc", "d"])
def test_activations_count_by_the_mean_of_their_readers(readers: str, bits: int) -> None:
    request, x = activation_named(subject(), readers[0]), read_by(readers[0])
    params = subject().params(request, bits)
    assert params is not None
    error = (snap(x, params) - x).double()
    assert found().own[Kind.ACTIVATION][request.source.name][bits] == pytest.approx(square(error) / 5, rel=OF_CODES)
    weights = [weight_of(subject(), map_named(subject(), name)).double() for name in readers]
    shares = [square(F.linear(error, weight)) / square(F.linear(x.double(), weight)) for weight in weights]
    assert found().relative[Kind.ACTIVATION][request.source.name][bits] == pytest.approx(
        sum(shares) / len(shares), rel=OF_CODES
    )


def test_chunks_make_no_difference() -> None:
    """But for the kernels, that round the sums of other sizes otherwise."""
    for name in ("own", "relative"):
        for kind in Kind:
            tables = [getattr(found(sizes), name)[kind] for sizes in ((5,), (3, 2), (1, 1, 3))]
            for table in tables[1:]:
                assert table.keys() == tables[0].keys()
                for part, row in table.items():
                    assert row == pytest.approx(tables[0][part], rel=OF_CODES)


def test_every_part_has_every_width() -> None:
    names = {Kind.WEIGHT: [node.name for node in subject().maps]}
    names[Kind.ACTIVATION] = [each.source.name for each in subject().activations]
    for tables in (found().own, found().relative):
        for kind, widths in ((Kind.WEIGHT, [2, 4, 8]), (Kind.ACTIVATION, [3, 8])):
            assert {name: list(row) for name, row in tables[kind].items()} == dict.fromkeys(names[kind], widths)


def test_biases_do_not_count_as_what_a_map_writes() -> None:
    """x = (1, 1) makes 3 + 1 = 4, and 100 more of the bias; what rounding moves the weights by, it moves the sum by."""
    dot = subject_of(
        lambda m, x: m.a(x), tensor([1.0, 1.0]), weight_widths=(2,), parts={"a": layer([3.0, 1.0], bias=[100.0])}
    )
    (node,) = dot.maps
    moved = float((dot.weight(node, 2).values - tensor(3.0, 1.0)).sum())
    assert moved != 0
    errors = squared_errors(dot, progress=Silent())
    assert errors.relative[Kind.WEIGHT][node.name][2] == pytest.approx((moved / 4) ** 2, rel=8 * EPS)


def test_a_map_that_writes_zeros_errs_by_nothing() -> None:
    zeros = subject_of(lambda m, x: m.a(x), torch.zeros(3, 2), parts={"a": layer([3.0, 1.0], bias=[1.0])})
    assert squared_errors(zeros, progress=Silent()).relative[Kind.WEIGHT] == {"linear": {2: 0.0, 4: 0.0, 8: 0.0}}


def test_half_the_mean_curvature_times_the_square() -> None:
    """6 / 3 elements * 10 / 2 = 10; an activation of no trace costs nothing; weights and activations share names."""
    errors = SquaredErrors(
        own={Kind.WEIGHT: {"a": {2: 10.0, 8: 0.5}}, Kind.ACTIVATION: {"a": {3: 4.0}, "b": {3: 7.0}}}, relative={}
    )
    traces = {Kind.WEIGHT: {"a": 6.0}, Kind.ACTIVATION: {"a": 5.0}}
    elements = {Kind.WEIGHT: {"a": 3}, Kind.ACTIVATION: {"a": 2, "b": 4}}
    score = weighted_by_trace("fisher", errors, traces, elements)
    assert score.method == "fisher"
    assert score.weights == {"a": {2: 10.0, 8: 0.5}}
    assert score.activations == {"a": {3: 5.0}, "b": {3: 0.0}}
