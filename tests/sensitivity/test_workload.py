"""What maps cost and what is held at a time, counted by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_subject import captured, made, placed
from torch import Tensor, nn

from normfuse.graph import Graph, ops, query
from normfuse.graph.quantization import request_weight, requests
from normfuse.precision.workload import Step, Work, steps_of, workload
from normfuse.quant import IntegerType
from normfuse.quant.bits import FLOAT
from normfuse.testing import seeded


def rand(*shape: int) -> Tensor:
    return torch.randn(shape, generator=seeded(0))


def only(m: Any, x: Tensor) -> Tensor:
    return m.a(x)  # type: ignore[no-any-return]


MAPS: list[Any] = [
    # five tokens
    pytest.param(nn.Linear(9, 7), rand(3, 5, 9), 63, 5 * 63, id="linear"),
    # a row of 11 positions, less 4 - 1
    pytest.param(nn.Conv1d(3, 5, 4), rand(3, 3, 11), 60, 8 * 60, id="one axis"),
    # (7 + 2 - 3) / 2 + 1 rows, 5 - 2 + 1 columns
    pytest.param(
        nn.Conv2d(3, 4, (3, 2), stride=(2, 1), padding=(1, 0)), rand(2, 3, 7, 5), 72, 4 * 4 * 72, id="convolution"
    ),
    # each of nine channels reads two
    pytest.param(nn.Conv2d(6, 9, (3, 2), groups=3), rand(2, 6, 4, 5), 9 * 2 * 6, 2 * 4 * 9 * 2 * 6, id="groups"),
    pytest.param(nn.Conv2d(6, 6, 3, groups=6, bias=False), rand(2, 6, 4, 5), 54, 2 * 3 * 54, id="channel by channel"),
]


@pytest.mark.parametrize(("part", "x", "parameters", "macs"), MAPS)
def test_work_of_a_map(part: nn.Module, x: Tensor, parameters: int, macs: int) -> None:
    graph = placed(captured(only, x, parts=made(a=part)))
    (found,) = workload(graph, [x]).values()
    assert found == Work(layer="a", parameters=parameters, macs=macs)


TRANSPOSED: list[Any] = [
    # 15 positions of four channels, each into three of six outputs at 2 * 3 places
    pytest.param(nn.ConvTranspose2d(4, 6, (2, 3), stride=2, groups=2), rand(2, 4, 3, 5), 72, 15 * 72, id="groups"),
    pytest.param(nn.ConvTranspose1d(4, 6, 3, stride=2, padding=1), rand(2, 4, 5), 72, 5 * 72, id="padding"),
]


@pytest.mark.parametrize(("part", "x", "parameters", "macs"), TRANSPOSED)
def test_work_of_a_transposed_map_is_that_of_its_inputs(part: nn.Module, x: Tensor, parameters: int, macs: int) -> None:
    graph = captured(only, x, parts=made(a=part))
    (node,) = (node for node in graph.nodes if query.is_call(node, *ops.TRANSPOSED_CONVOLUTIONS))
    request_weight(node, IntegerType(8, signed=True))
    assert workload(graph, [x]) == {node.name: Work(layer="a", parameters=parameters, macs=macs)}


def test_sizes_are_those_of_the_sample() -> None:
    x = rand(2, 3, 7, 5)
    model = nn.Conv2d(3, 4, 3)
    graph = placed(captured(only, x, parts=made(a=model)))
    for count in (1, 2, 6):
        (found,) = workload(graph, [rand(count, 3, 7, 5)]).values()
        assert found.macs == 5 * 3 * 108


def test_a_fixed_batch_is_shared_by_its_samples() -> None:
    x = rand(2, 9)
    graph = placed(captured(lambda m, x: m.a(x.reshape(2, 9)), x, parts=made(a=nn.Linear(9, 7))))
    assert not graph.has_dynamic_batch
    (found,) = workload(graph, [x]).values()
    assert found.macs == 63


def test_maps_that_stay_float_are_not_counted() -> None:
    parts = made(a=nn.Linear(9, 7), b=nn.Linear(7, 3).double())
    graph = placed(captured(lambda m, x: m.b(m.a(x).double()), X, parts=parts))
    assert [work.layer for work in workload(graph, [X]).values()] == ["a"]


X = rand(2, 9)
PARTS = made(a=nn.Linear(9, 7), b=nn.Linear(7, 11), c=nn.Linear(7, 3), d=nn.Linear(7, 7))


def chain(m: Any, x: Tensor) -> Tensor:
    return m.b(m.a(x).relu())  # type: ignore[no-any-return]


def residual(m: Any, x: Tensor) -> Tensor:
    y = m.a(x).tanh()
    return y + m.d(y.relu())  # type: ignore[no-any-return]


def viewed(m: Any, x: Tensor) -> Tensor:
    """The view is read behind a call that reads nothing of it."""
    y = m.a(x).tanh()
    seen = y.reshape(-1, 7, 1).transpose(1, 2)
    return m.b(y.relu()).unsqueeze(2) * seen.mean(2, keepdim=True)  # type: ignore[no-any-return]


def coded_views(m: Any, x: Tensor) -> Tensor:
    """All that reads the tangents are views, and of these a map that reads codes."""
    return m.b(m.a(x).tanh().reshape(-1, 1, 7).transpose(0, 1))  # type: ignore[no-any-return]


def kept(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    y = m.a(x).tanh()
    return y, m.c(m.d(y).relu())


def shared(m: Any, x: Tensor) -> Tensor:
    y = m.a(x).relu()
    return m.b(y).sum(1, keepdim=True) + m.c(y)  # type: ignore[no-any-return]


INPUT = "inputs_0"

Expected = list[tuple[float, dict[str, int]]]
STEPS: list[tuple[Callable[[Any, Tensor], Any], Expected]] = [
    # a reads 9 codes and writes 7 floats; b reads 7 codes and writes 11 floats. Between them there are 7 and 7.
    (chain, [(28, {INPUT: 9}), (44, {"relu": 7})]),
    # The tangents wait for the sum: beside d's codes and 7 floats, then beside these and the sum.
    (residual, [(28, {INPUT: 9}), (56, {"relu": 7}), (84, {})]),
    # The tangents wait as a view for the mean, beside b's codes and 11 floats; then 1, 11 and 11 are multiplied.
    (viewed, [(28, {INPUT: 9}), (72, {"relu": 7}), (92, {})]),
    # The tangents are as many codes, by the name of the view that a request stands behind.
    (coded_views, [(28, {INPUT: 9}), (44, {"transpose": 7})]),
    # The tangents are an output, floats to the end: beside what d has written and its codes.
    (kept, [(28, {INPUT: 9}), (56, {"relu": 7})]),
    # The codes wait for c: beside b's 11 floats and their sum. They are held once.
    (shared, [(28, {INPUT: 9}), (48, {"relu": 7})]),
]


def held(graph: Graph, x: Tensor) -> Expected:
    return [(step.floats, dict(step.codes)) for step in steps_of(graph, [x])]


@pytest.mark.parametrize(("function", "expected"), STEPS)
def test_steps_in_which_most_is_held(function: Callable[[Any, Tensor], Any], expected: Expected) -> None:
    assert held(placed(captured(function, X, parts=PARTS)), X) == expected


@pytest.mark.parametrize("count", [1, 3])
def test_what_is_held_is_that_of_one_sample(count: int) -> None:
    assert held(placed(captured(chain, X, parts=PARTS)), rand(count, 9)) == STEPS[0][1]


def test_of_floats_the_largest_step_is_left() -> None:
    """9 and 7, 7 and 7, 7 and 11."""
    assert held(placed(captured(chain, X, parts=PARTS), FLOAT), X) == [(72, {})]


def test_what_is_read_as_codes_and_floats_is_floats() -> None:
    """The image is added to what two maps make of it: 9 floats wait."""

    def function(m: Any, x: Tensor) -> Tensor:
        return x + m.f(m.e(x))  # type: ignore[no-any-return]

    parts = made(e=nn.Linear(9, 2), f=nn.Linear(2, 9))
    graph = placed(captured(function, X, parts=parts))
    assert held(graph, X) == [(36 + 36, {"linear": 2}), (36 + 36 + 36, {})]


def test_codes_that_convolutions_write_are_held_as_such() -> None:
    """8 positions of four channels, by two convolutions, added: all of it are codes but the two outputs."""
    parts = made(a=nn.Conv1d(3, 4, 3, padding=1), b=nn.Conv1d(4, 4, 3, padding=1), c=nn.Conv1d(4, 2, 8))
    x = rand(2, 3, 8)
    graph = placed(captured(lambda m, x: m.c((y := m.a(x)) + m.b(y)), x, parts=parts))
    first, second, total = (request.source.name for request in requests(graph)[1:])
    found = held(graph, x)
    assert ({name for _, codes in found for name in codes}) == {INPUT, first, second, total}
    assert found == [(0, {INPUT: 24, first: 32}), (0, {first: 32, second: 32, total: 32}), (8, {total: 32})]


WITHIN = [
    (Step(floats=4.0, codes={"y": 3}), Step(floats=4.0, codes={"y": 3, "z": 1}), True),
    (Step(floats=4.0, codes={"y": 3}), Step(floats=5.0, codes={"y": 2}), False),
    (Step(floats=4.0, codes={"y": 3}), Step(floats=3.0, codes={"y": 3}), False),
    (Step(floats=4.0, codes={"y": 3}), Step(floats=9.0, codes={"z": 3}), False),
]


@pytest.mark.parametrize(("step", "other", "expected"), WITHIN)
def test_a_step_is_within_another_whatever_the_widths(step: Step, other: Step, expected: bool) -> None:
    assert step.within(other) is expected
