"""The channel axis through views, selections and means: checked against where the numbers really go."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn

from normfuse.graph import Graph, capture, query
from normfuse.graph.channel import axis_after, axis_before
from normfuse.passes.canonicalize import Canonicalize
from normfuse.testing import Small, seeded

Function = Callable[[nn.Module, Tensor], Tensor]


def last_call(graph: Graph) -> fx.Node:
    return [node for node in graph.nodes if node.op == "call_function"][-1]


def canonical(function: Function, shape: tuple[int, ...]) -> Graph:
    graph = capture(Small(function), torch.randn(shape, generator=seeded(0)))
    Canonicalize().run(graph)
    return graph


def truth(function: Function, shape: tuple[int, ...], axis: int) -> int | None:
    """Where a tensor that holds its own index along ``axis`` varies, if it holds it whole and in order."""
    size = shape[axis]
    index = torch.arange(1.0, size + 1).reshape([-1 if i == axis else 1 for i in range(len(shape))]).expand(shape)
    result = function(nn.Module(), index.clone())
    for candidate, length in enumerate(result.shape):
        view = [-1 if i == candidate else 1 for i in range(result.ndim)]
        if length == size and torch.equal(result, torch.arange(1.0, size + 1).reshape(view).expand_as(result)):
            return candidate
    return None


MOVES = [
    pytest.param(lambda m, x: x.permute(0, 2, 1, 3), (2, 3, 5, 7), id="permute"),
    pytest.param(lambda m, x: x.permute(0, -1, -3, -2), (2, 3, 5, 7), id="permute negative"),
    pytest.param(lambda m, x: x.transpose(-1, 1), (2, 3, 5, 7), id="transpose negative"),
    pytest.param(lambda m, x: x.flatten(2), (2, 3, 5, 7), id="flatten space"),
    pytest.param(lambda m, x: x.flatten(0, 1), (2, 3, 5), id="flatten tokens into batch"),
    pytest.param(lambda m, x: x.unflatten(-1, (3, 2)), (2, 5, 6), id="split heads"),
    pytest.param(lambda m, x: x.unsqueeze(1), (2, 5, 3), id="unsqueeze"),
    pytest.param(lambda m, x: x.squeeze(-2), (2, 3, 1, 5), id="squeeze"),
    pytest.param(lambda m, x: x.reshape(-1, 3), (2, 3, 3), id="equal sizes: (B, C, C) to (B * C, C)"),
    pytest.param(lambda m, x: x.reshape(-1, 6), (2, 3, 6), id="B * N equals C"),
    pytest.param(lambda m, x: x.reshape(-1, 3, 5), (2, 5, 3), id="equal sizes in another order"),
    pytest.param(lambda m, x: x.reshape(-1, 2, 2, 2), (2, 4, 2), id="a part that looks like the whole"),
    pytest.param(lambda m, x: x.reshape(-1, 4, 4), (2, 2, 8), id="no axis but the batch is kept"),
    pytest.param(lambda m, x: x[:, 0], (2, 3, 5), id="select token"),
    pytest.param(lambda m, x: x.select(-2, 1), (2, 3, 5), id="select negative"),
    pytest.param(lambda m, x: x.select(-1, 1), (2, 3, 5), id="select a channel"),
    pytest.param(lambda m, x: x[:, 1::2], (2, 5, 3), id="slice with steps"),
    pytest.param(lambda m, x: x[..., 1:], (2, 5, 3), id="slice channels"),
    pytest.param(lambda m, x: x.mean(1), (2, 3, 5), id="mean"),
    pytest.param(lambda m, x: x.mean((-1, -2)), (2, 3, 5, 7), id="mean of negative axes"),
    pytest.param(lambda m, x: x.mean((1, 2), keepdim=True), (2, 3, 5, 7), id="mean keeping axes"),
]


@pytest.mark.parametrize(("function", "shape"), MOVES)
def test_axis_after_is_where_the_numbers_go(function: Function, shape: tuple[int, ...]) -> None:
    graph = canonical(function, shape)
    node = last_call(graph)
    for axis in range(1, len(shape)):
        found = axis_after(node, axis)
        if shape[axis] == 1:
            continue  # one channel: every axis is right
        expected = truth(function, shape, axis)
        assert found is None or found == expected
        # Whole and in order, yet on one axis only if nothing else was merged into it: then it must be found.
        assert (found is None) == (expected is None)


@pytest.mark.parametrize(("function", "shape"), MOVES[:13])
def test_axis_before_undoes_axis_after(function: Function, shape: tuple[int, ...]) -> None:
    view = last_call(canonical(function, shape))
    for axis, size in enumerate(shape):
        if axis and size != 1 and (after := axis_after(view, axis)) is not None:
            assert axis_before(view, after) == axis
    for axis in range(query.rank(view)):
        before = axis_before(view, axis)
        assert before is None or query.shape(view)[axis] == query.shape(view.args[0])[before]  # type: ignore[arg-type]
