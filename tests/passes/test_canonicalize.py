"""One spelling per operation, and not one number changed."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from normfuse.graph import Graph, capture, ops, query
from normfuse.passes.canonicalize import Canonicalize
from normfuse.passes.fold_constants import FoldConstants
from normfuse.pipeline import Phase, Pipeline
from normfuse.testing import Golden, Small, check_pass_contract, distance, picture, seeded

ATEN = ops.ATEN


def sample(*shape: int) -> Tensor:
    return torch.randn(shape, generator=seeded(9), dtype=torch.float64)


def calls(graph: Graph) -> list[str]:
    return [str(node.target).removeprefix("aten.") for node in graph.nodes if node.op == "call_function"]


def many_spellings(m: Any, x: Tensor) -> Tensor:
    tokens = m.patch(x).flatten(2).transpose(1, 2).contiguous()
    heads = torch.dropout(tokens, 0.5, False).view(x.shape[0], -1, 2, 3).permute(0, 2, 1, 3)
    joined = heads.transpose(1, 2).reshape(x.shape[0], -1, 6)[:, :].unsqueeze(1).squeeze(1).clone()
    mixed: Tensor = torch.addmm(m.bias, joined.reshape(-1, 6), m.matrix).view(x.shape[0], -1, 7).mT @ joined.double()
    return mixed.expand(-1, 7, 6)


def model() -> nn.Module:
    matrix = torch.randn(6, 7, generator=seeded(1)).double()
    return Small(many_spellings, patch=nn.Conv2d(3, 6, 3, padding="same").double(), matrix=matrix, bias=matrix[0])


def test_picture(golden: Golden) -> None:
    graph = capture(model(), (sample(2, 3, 4, 5),))
    before = graph.text()
    Canonicalize().run(graph)
    assert picture(before, graph.text()) == golden


def test_numbers_and_contract() -> None:
    x, original = sample(2, 3, 4, 5), model()
    graph = capture(original, (x,))
    assert check_pass_contract(Canonicalize(), graph, (x,)).changed
    Canonicalize().run(graph)
    for batch in (1, 2, 5):
        x = sample(batch, 3, 4, 5)
        assert distance(graph.run(x), [original(x)]) < 1e-15


IDENTITIES = [
    pytest.param(lambda m, x: x.clone().relu(), id="clone"),
    pytest.param(lambda m, x: x.contiguous().detach().relu(), id="contiguous"),
    pytest.param(lambda m, x: torch.dropout(x, 0.3, False).relu(), id="dropout in eval mode"),
    pytest.param(lambda m, x: x[:, 0:5].relu(), id="full slice"),
    pytest.param(lambda m, x: x.to(torch.float64).relu(), id="cast to its own type"),
    pytest.param(lambda m, x: x.expand(-1, 5, 7).relu(), id="expand to its own shape"),
    pytest.param(lambda m, x: x.view(-1, 5, 7).relu(), id="view of its own shape"),
    pytest.param(lambda m, x: x.mT.mT.relu(), id="two transposes"),
    pytest.param(lambda m, x: x.flatten(1).unflatten(1, (5, 7)).relu(), id="flatten and back"),
    pytest.param(lambda m, x: x.movedim(1, 2).movedim(-1, -2).relu(), id="moved there and back"),
]


@pytest.mark.parametrize("function", IDENTITIES)
def test_what_returns_its_input_goes(function: Any) -> None:
    graph = capture(Small(function), (sample(3, 5, 7),))
    Canonicalize().run(graph)
    assert calls(graph) == ["relu.default"]


@pytest.mark.parametrize(
    "function",
    [
        pytest.param(lambda m, x: x[:, 1:].relu(), id="slice"),
        pytest.param(lambda m, x: x[:, ::2].relu(), id="slice with a step"),
        pytest.param(lambda m, x: x[:, :1].expand(-1, 5, 7).relu(), id="expand"),
        pytest.param(lambda m, x: x.float().double().relu(), id="cast and back: it rounds"),
        pytest.param(lambda m, x: x.reshape(-1, 7, 5).relu(), id="another shape"),
        pytest.param(lambda m, x: x[:, :, :5].mT.relu(), id="transposed square"),
        pytest.param(lambda m, x: x.flip(1).relu(), id="unknown"),
    ],
)
def test_what_changes_something_stays(function: Any) -> None:
    x = sample(3, 5, 7)
    graph = capture(Small(function), (x,))
    Canonicalize().run(graph)
    assert len(calls(graph)) > 1
    assert distance(graph.run(x), [function(None, x)]) == 0


@pytest.mark.parametrize(
    ("function", "shape"),
    [
        pytest.param(lambda m, x: x @ m.w, (4, 5), id="matrix"),
        pytest.param(lambda m, x: x @ m.w, (2, 4, 5), id="batch"),
        pytest.param(lambda m, x: torch.mm(x, m.w), (4, 5), id="mm"),
        pytest.param(lambda m, x: torch.addmm(m.b, x, m.w), (4, 5), id="addmm"),
        pytest.param(lambda m, x: torch.addmm(m.s, x, m.w), (4, 5), id="addmm, one bias for all"),
    ],
)
def test_products_with_a_constant_matrix_are_linear(function: Any, shape: tuple[int, ...]) -> None:
    x, parts = sample(*shape), {"w": sample(5, 3), "b": sample(3), "s": sample(1)}
    graph = capture(Small(function, **parts), (x,))
    Canonicalize().run(graph)
    assert any(query.is_call(node, ops.LINEAR) for node in graph.nodes)
    assert distance(graph.run(x), [function(Small(function, **parts), x)]) < 1e-15


@pytest.mark.parametrize(
    ("function", "shape"),
    [
        pytest.param(lambda m, x: m.w.mT @ x, (5, 4), id="constant on the left"),
        pytest.param(lambda m, x: x @ m.w[:, 0], (4, 5), id="constant vector"),
        pytest.param(lambda m, x: x[0] @ m.w, (4, 5), id="variable vector"),
        pytest.param(lambda m, x: x @ m.w.expand(2, 5, 3), (2, 4, 5), id="constant of three axes"),
        pytest.param(lambda m, x: torch.addmm(m.b, x, m.w, alpha=2), (4, 5), id="scaled"),
        pytest.param(lambda m, x: torch.addmm(x[:, :3], x, m.w), (4, 5), id="variable bias"),
        pytest.param(lambda m, x: torch.addmm(m.c, x[:4], m.w), (4, 5), id="bias of two axes"),
        pytest.param(lambda m, x: (x * 9).long() @ m.w.long(), (4, 5), id="integers"),
        pytest.param(lambda m, x: x @ x.mT, (4, 5), id="two variables"),
    ],
)
def test_other_products_stay(function: Any, shape: tuple[int, ...]) -> None:
    x, parts = sample(*shape), {"w": sample(5, 3), "b": sample(3), "c": sample(4, 3)}
    graph = capture(Small(function, **parts), (x,))
    Canonicalize().run(graph)
    assert not any(query.is_call(node, ops.LINEAR) for node in graph.nodes)
    assert distance(graph.run(x), [function(Small(function, **parts), x)]) == 0


@pytest.mark.parametrize(
    ("function", "shape"),
    [
        pytest.param(lambda m, x: torch.addmm(m.one, x, m.w), (4, 5), id="addmm, one for all"),
        pytest.param(lambda m, x: nn.functional.linear(x, m.w.mT, m.one), (2, 4, 5), id="linear, one for all"),
        pytest.param(lambda m, x: nn.functional.linear(x, m.w.mT, m.one[0]), (2, 4, 5), id="linear, a number"),
        pytest.param(lambda m, x: nn.functional.linear(x, m.w.mT, m.rows[:1]), (2, 4, 5), id="linear, one row"),
        pytest.param(lambda m, x: nn.functional.linear(x, m.w.mT, m.rows), (2, 4, 5), id="linear, a row per token"),
        pytest.param(lambda m, x: nn.functional.linear(x[0, 0], m.w.mT, m.rows[:1]), (2, 4, 5), id="makes an axis"),
    ],
)
def test_a_bias_is_one_number_per_output(function: Any, shape: tuple[int, ...]) -> None:
    x, parts = sample(*shape), {"w": sample(5, 3), "one": sample(1), "rows": sample(4, 3)}
    graph = capture(Small(function, **parts), (x,))
    Pipeline(phases=(Phase("canonical", (Canonicalize(), FoldConstants(), Canonicalize())),)).run(graph)
    (linear,) = [node for node in graph.nodes if query.is_call(node, ops.LINEAR)]
    bias = query.argument(linear, 2, "bias")
    assert bias is None or query.shape(bias) == (3,)
    assert distance(graph.run(x), [function(Small(function, **parts), x)]) < 1e-15


@pytest.mark.parametrize(
    ("padding", "kernel", "dilation", "expected"),
    [
        pytest.param("same", (3, 5), (1, 1), [1, 2], id="same"),
        pytest.param("same", (3, 4), (2, 2), [2, 3], id="an even kernel, dilated evenly"),
        pytest.param("valid", (2, 3), (1, 1), [0, 0], id="valid"),
        pytest.param("same", (2, 3), (1, 1), None, id="more on one side: left"),
    ],
)
def test_padding_by_a_word(padding: str, kernel: Any, dilation: Any, expected: list[int] | None) -> None:
    conv = nn.Conv2d(4, 6, kernel, padding=padding, dilation=dilation, groups=2).double()
    x = sample(2, 4, 9, 8)
    graph = capture(conv, (x,))
    Canonicalize().run(graph)
    found = [list(node.args[4]) for node in graph.nodes if query.is_call(node, ops.CONV2D)]  # type: ignore[arg-type]
    assert found == ([] if expected is None else [expected])
    assert distance(graph.run(x), [conv(x)]) < 1e-15


def test_two_dynamic_axes_stay() -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return (x.unsqueeze(1) * y.unsqueeze(0)).flatten(0, 1).reshape(x.shape[0], y.shape[0], 5)

    graph = capture(Two(), (sample(2, 5), sample(3, 5)))
    Canonicalize().run(graph)
    x, y = sample(4, 5), sample(7, 5)
    assert distance(graph.run(x, y), [x.unsqueeze(1) * y]) == 0
