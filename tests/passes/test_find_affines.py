"""Affines are found by what the graph computes, wherever they hide, and nothing else is taken for one."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from normfuse.graph import Graph, capture, ops, query
from normfuse.graph.affine import AFFINE, Affine, read_affine
from normfuse.nn import RepBN, UnifiedNorm
from normfuse.passes.canonicalize import Canonicalize
from normfuse.passes.find_affines import FindAffines
from normfuse.passes.fold_constants import FoldConstants
from normfuse.report import PassReport, Reason
from normfuse.testing import Golden, Small, check_pass_contract, distance, outputs, picture, randomized, seeded


def canonical(model: nn.Module, x: Tensor) -> Graph:
    graph = capture(model, (x,))
    Canonicalize().run(graph)
    FoldConstants().run(graph)
    return graph


def sample(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=seeded(9), dtype=dtype)


def found(model: nn.Module, x: Tensor) -> tuple[list[Affine], PassReport]:
    graph = canonical(model, x)
    report = FindAffines().run(graph)
    return [read_affine(graph, node) for node in graph.nodes if query.is_call(node, AFFINE)], report


class Block(nn.Module):
    """Every kind of affine: batch norm, layer norm, RepBN through views, a scale behind scores."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.bn = nn.Conv2d(3, 5, 2, stride=2), nn.BatchNorm2d(5)
        self.rep, self.ln, self.scale = RepBN(5), nn.LayerNorm(5), nn.Parameter(torch.ones(5))

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.rep(self.bn(self.patch(x)).flatten(2).transpose(1, 2))
        normed = self.ln(tokens)
        mixed: Tensor = (normed @ normed.mT * 0.4472135955) @ normed
        stream: Tensor = tokens + self.scale * mixed
        return stream


def test_picture(golden: Golden) -> None:
    graph = canonical(randomized(Block()), sample(2, 3, 4, 6, dtype=torch.float32))
    before = graph.text()
    report = FindAffines().run(graph)
    assert report.changed
    assert picture(before, graph.text()) == golden


def test_numbers() -> None:
    model = randomized(Block()).double()
    graph = canonical(model, sample(2, 3, 4, 6))
    FindAffines().run(graph)
    x = sample(3, 3, 4, 6)
    assert distance(graph.run(x), [model(x)]) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_contract(dtype: torch.dtype) -> None:
    x = sample(2, 3, 4, 6, dtype=torch.float32).to(dtype)
    report = check_pass_contract(FindAffines(), canonical(randomized(Block()).to(dtype), x), (x,))
    assert report.changed


def test_batch_norm_is_the_equation() -> None:
    norm = randomized(nn.BatchNorm1d(5, eps=0.25)).double()
    ((affine,), _) = found(norm, sample(4, 5, 3))
    assert isinstance(norm.running_var, Tensor)
    assert isinstance(norm.running_mean, Tensor)
    scale = norm.weight / torch.sqrt(norm.running_var + 0.25)
    torch.testing.assert_close(affine.scale, scale.detach(), rtol=1e-15, atol=0)
    torch.testing.assert_close(affine.shift, (norm.bias - norm.running_mean * scale).detach(), rtol=1e-14, atol=0)
    assert affine.axis == 1


def test_repbn_has_eta_in_the_scale() -> None:
    norm = randomized(RepBN(5)).double()
    ((affine,), _) = found(norm, sample(4, 3, 5))
    bn = norm.bn
    assert isinstance(bn.running_var, Tensor)
    assert isinstance(bn.running_mean, Tensor)
    scale = bn.weight / torch.sqrt(bn.running_var + bn.eps) + norm.alpha
    shift = bn.bias - bn.running_mean * (scale - norm.alpha)
    torch.testing.assert_close(affine.scale, scale.detach(), rtol=1e-15, atol=1e-15)
    torch.testing.assert_close(affine.shift, shift.detach(), rtol=1e-15, atol=1e-15)
    assert affine.axis == 2


def test_two_spellings_of_unified_norm_are_one_affine() -> None:
    norm = randomized(UnifiedNorm(5)).double()
    weight, bias, variance = norm.weight, norm.bias, norm.running_var
    other = Small(lambda m, x: x / torch.sqrt(m.v + 1e-5) * m.w + m.b, v=variance, w=weight, b=bias)
    ((first,), _), ((second,), _) = found(norm, sample(4, 3, 5)), found(other, sample(4, 3, 5))
    torch.testing.assert_close(first.scale, second.scale, rtol=1e-15, atol=0)
    assert torch.equal(first.shift, second.shift)
    assert first.axis == second.axis == 2


def test_constants_are_computed_in_float64_from_float32_statistics() -> None:
    norm = randomized(nn.BatchNorm1d(5))
    ((affine,), _) = found(norm, sample(4, 5, dtype=torch.float32))
    assert isinstance(norm.running_var, Tensor)
    wide = norm.weight.double() / torch.sqrt(norm.running_var.double() + norm.eps)
    torch.testing.assert_close(affine.scale, wide.detach(), rtol=1e-15, atol=0)


def test_the_affine_keeps_the_name_of_its_layer() -> None:
    model = randomized(nn.Sequential(nn.Flatten(2), nn.BatchNorm1d(5)))
    graph = canonical(model, sample(4, 5, 3, 2, dtype=torch.float32))
    FindAffines().run(graph)
    (layer,) = [query.layer_of(node) for node in graph.nodes if query.is_call(node, AFFINE)]
    assert layer == "1"


def test_refused_where_the_statistics_are_computed() -> None:
    def function(m: Any, x: Tensor) -> Tensor:
        return nn.functional.batch_norm(x, x.mean((0, 2)), m.variance)

    affines, report = found(Small(function, variance=torch.ones(5)), sample(4, 5, 3, dtype=torch.float32))
    assert affines == []
    assert [refusal.reason for refusal in report.refused] == [Reason.NOT_CONSTANT]


NO_AFFINES = [
    pytest.param(lambda m, x: x * x, (4, 5), id="two variables"),
    pytest.param(lambda m, x: m.vector / x, (4, 5), id="one over"),
    pytest.param(lambda m, x: x * m.matrix, (4, 5), id="varies along two axes"),
    pytest.param(lambda m, x: x[:, :1] * m.vector, (4, 5), id="makes the tensor larger"),
    pytest.param(lambda m, x: x[0] * m.matrix[:1], (4, 5), id="of more axes"),
    pytest.param(lambda m, x: torch.add(x, m.vector, alpha=2), (4, 5), id="alpha"),
    pytest.param(lambda m, x: torch.div(x, 2.0, rounding_mode="floor"), (4, 5), id="rounded quotient"),
    pytest.param(lambda m, x: x.long() * 3 + 1, (4, 5), id="integers"),
    pytest.param(lambda m, x: x.float() * m.vector, (4, 5), id="a product that is wider than the tensor"),
    pytest.param(lambda m, x: x.float() + m.vector, (4, 5), id="a sum that is wider than the tensor"),
    pytest.param(lambda m, x: x.half() * 1e5, (4, 5), id="a scale too large for float16"),
    pytest.param(lambda m, x: x.half() / 1e6, (4, 5), id="a scale too small for float16"),
    pytest.param(lambda m, x: x / 0.0, (4, 5), id="division by zero"),
    pytest.param(lambda m, x: x + float("-inf"), (4, 5), id="a mask of -inf"),
    pytest.param(lambda m, x: nn.functional.layer_norm(x, (4, 5), m.square, m.square), (2, 4, 5), id="two-axis norm"),
]


@pytest.mark.parametrize(("function", "shape"), NO_AFFINES)
def test_what_is_no_affine_stays(function: Any, shape: tuple[int, ...]) -> None:
    parts = {"vector": sample(5), "matrix": sample(4, 5), "square": sample(4, 5)}
    model, x = Small(function, **parts), sample(*shape)
    graph = canonical(model, x)
    expected = graph.text()
    report = FindAffines().run(graph)
    assert not report.changed
    assert graph.text() == expected
    assert distance(graph.run(x), [model(x)]) == 0


def test_an_affine_with_another_reader_is_not_computed_twice() -> None:
    affines, report = found(Small(lambda m, x: ((y := x * 2.0 + 1.0) * 3.0, y.relu())), sample(4, 5))
    assert len(affines) == 2
    assert report.applied["affine-of-affine"] == 1


def test_an_affine_stays_behind_a_view_that_something_else_reads() -> None:
    model = Small(lambda m, x: ((y := x.mT) * m.s, y.relu()), s=sample(5, 1))
    ((affine,), report) = found(model, sample(4, 3, 5))
    assert "affine-before-view" not in report.applied
    assert affine.axis == 1


def test_a_scale_stays_behind_a_product_that_something_else_reads() -> None:
    _, report = found(Small(lambda m, x: ((y := x @ x.mT) * 2.0, y.relu())), sample(4, 5))
    assert "scale-before-product" not in report.applied


class EndedProgression(nn.Module):
    """PRepBN as some write it: both norms are computed, whatever the progression."""

    def __init__(self) -> None:
        super().__init__()
        self.ln, self.rep = nn.LayerNorm(5), RepBN(5)
        self.register_buffer("left", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        share = self.left / 100
        y: Tensor = share * self.ln(x) + (1 - share) * self.rep(x)
        return y


@pytest.mark.parametrize("left", [0, 7])
def test_the_end_of_a_progression_leaves_the_batch_norm(left: int) -> None:
    model, x = randomized(EndedProgression()).double(), sample(4, 3, 5)
    model.left.fill_(left)  # type: ignore[operator, union-attr]
    graph = canonical(model, x)
    report = FindAffines().run(graph)
    assert ("zero-is-not-added" in report.applied) is (left == 0)
    assert any(query.is_call(node, ops.LAYER_NORM) for node in graph.nodes) is (left > 0)
    assert distance(outputs(model, x), graph.run(x)) < 1e-14


def test_a_zero_that_widens_the_sum_stays() -> None:
    model, x = Small(lambda m, x: x[:1].relu() + x * 0.0), sample(4, 5)
    graph = canonical(model, x)
    FindAffines().run(graph)
    (out,) = graph.run(x)
    assert out.shape == (4, 5)
    assert torch.equal(out, model(x))
