"""Products with a constant matrix are linear, however they are spelled."""

from typing import Any

import pytest
import torch
from torch import nn

from normfuse.graph import Graph, capture, ops, query
from normfuse.passes.canonicalize import Canonicalize
from normfuse.passes.fold_constants import FoldConstants
from normfuse.passes.presets import PLAIN
from normfuse.pipeline import Phase, Pipeline
from normfuse.testing import Small, distance, sample


def linear_maps(graph: Graph) -> int:
    return sum(query.is_call(node, ops.LINEAR) for node in graph.nodes)


@pytest.mark.parametrize(
    ("function", "shape"),
    [
        pytest.param(lambda m, x: x @ m.w, (4, 5), id="matrix"),
        pytest.param(lambda m, x: x @ m.w, (2, 4, 5), id="batch"),
        pytest.param(lambda m, x: torch.mm(x, m.w), (4, 5), id="mm"),
        pytest.param(lambda m, x: torch.addmm(m.b, x, m.w), (4, 5), id="addmm"),
        pytest.param(lambda m, x: torch.addmm(m.s, x, m.w), (4, 5), id="addmm, one bias for all"),
        pytest.param(lambda m, x: torch.addmm(m.b, x, m.w, alpha=2, beta=3), (4, 5), id="addmm, scaled"),
        pytest.param(lambda m, x: torch.addmm(m.b, x, m.w, beta=0), (4, 5), id="addmm without its bias"),
        pytest.param(lambda m, x: x @ m.w.expand(2, 5, 3), (2, 4, 5), id="repeated for every sample"),
        pytest.param(lambda m, x: torch.bmm(x, m.w.expand(x.shape[0], 5, 3)), (2, 4, 5), id="bmm, repeated"),
        pytest.param(lambda m, x: x @ m.one, (2, 4, 5), id="one matrix of three axes"),
        pytest.param(lambda m, x: torch.einsum("bnc,co->bno", x, m.w), (2, 4, 5), id="einsum"),
        pytest.param(lambda m, x: torch.einsum("co,bnc->bon", m.w, x), (2, 4, 5), id="einsum, matrix first"),
        pytest.param(lambda m, x: torch.einsum("bnc, oc -> bno", x, m.v), (2, 4, 5), id="einsum, rows are outputs"),
        pytest.param(lambda m, x: torch.einsum("bchw,co->bohw", x, m.w), (2, 5, 4, 7), id="einsum over axis 1"),
        pytest.param(lambda m, x: torch.einsum("...c,co->...o", x, m.w), (2, 7, 4, 5), id="einsum with an ellipsis"),
        pytest.param(lambda m, x: torch.einsum("nc,co->on", x, m.w), (4, 5), id="einsum, transposed"),
    ],
)
def test_products_with_a_constant_matrix_are_linear(function: Any, shape: tuple[int, ...]) -> None:
    w = sample(5, 3)
    x, parts = sample(*shape), {"w": w, "v": w.mT.contiguous(), "one": w[None], "b": sample(3), "s": sample(1)}
    graph = capture(Small(function, **parts), (x,))
    Canonicalize().run(graph)
    assert linear_maps(graph) == 1
    assert distance(graph.run(x), [function(Small(function, **parts), x)]) < 1e-15


@pytest.mark.parametrize(
    ("function", "shape"),
    [
        pytest.param(lambda m, x: m.w.mT @ x, (5, 4), id="constant on the left"),
        pytest.param(lambda m, x: x @ m.w[:, 0], (4, 5), id="constant vector"),
        pytest.param(lambda m, x: x[0] @ m.w, (4, 5), id="variable vector"),
        pytest.param(lambda m, x: x @ m.two, (2, 4, 5), id="a matrix for every sample"),
        pytest.param(lambda m, x: x @ m.two, (4, 5), id="two matrices for one sample"),
        pytest.param(lambda m, x: x @ m.w[None], (4, 5), id="makes an axis"),
        pytest.param(lambda m, x: x @ m.w[:, :1].expand(5, 3), (4, 5), id="repeated along the outputs"),
        pytest.param(lambda m, x: torch.addmm(x[:, :3], x, m.w), (4, 5), id="variable bias"),
        pytest.param(lambda m, x: torch.addmm(m.c, x[:4], m.w), (4, 5), id="bias of two axes"),
        pytest.param(lambda m, x: (x * 9).long() @ m.w.long(), (4, 5), id="integers"),
        pytest.param(lambda m, x: x @ x.mT, (4, 5), id="two variables"),
        pytest.param(lambda m, x: torch.einsum("nc,nc->n", x, x), (4, 5), id="einsum of two variables"),
        pytest.param(lambda m, x: torch.einsum("nc,co->nco", x, m.w), (4, 5), id="einsum without a sum"),
        pytest.param(lambda m, x: torch.einsum("nc,co->n", x, m.w), (4, 5), id="einsum that sums the outputs"),
        pytest.param(lambda m, x: torch.einsum("nc,cc->n", x, m.w[:, :1].expand(5, 5)), (4, 5), id="einsum, diagonal"),
        pytest.param(lambda m, x: torch.einsum("nn,no->no", x[:, :4], m.c), (4, 5), id="einsum, the same axis twice"),
        pytest.param(lambda m, x: torch.einsum("nc,dco->ndo", x, m.two), (4, 5), id="einsum, matrix of three axes"),
        pytest.param(lambda m, x: torch.einsum("nc,co", x, m.w), (4, 5), id="einsum that does not say its result"),
        pytest.param(lambda m, x: torch.einsum("nc->cn", x), (4, 5), id="einsum of one tensor"),
    ],
)
def test_other_products_stay(function: Any, shape: tuple[int, ...]) -> None:
    x, parts = sample(*shape), {"w": sample(5, 3), "b": sample(3), "c": sample(4, 3), "two": sample(2, 5, 3)}
    graph = capture(Small(function, **parts), (x,))
    Canonicalize().run(graph)
    assert not linear_maps(graph)
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
    "function",
    [
        pytest.param(lambda m, x: x @ m.v.T, id="T"),
        pytest.param(lambda m, x: x @ m.v.mT, id="mT"),
        pytest.param(lambda m, x: x @ (m.v * 2.0).T, id="computed"),
        pytest.param(lambda m, x: x @ m.v.T.expand(x.shape[0], 5, 3), id="expanded"),
        pytest.param(lambda m, x: torch.einsum("bnc,co->bno", x, m.v.T), id="einsum"),
    ],
)
def test_a_product_with_a_matrix_that_is_computed_is_linear(function: Any) -> None:
    x, parts = sample(2, 4, 5), {"v": sample(3, 5)}
    graph = capture(Small(function, **parts), (x,))
    Pipeline(phases=(PLAIN,)).run(graph)
    assert linear_maps(graph) == 1
    assert distance(graph.run(x), [function(Small(function, **parts), x)]) < 1e-15
