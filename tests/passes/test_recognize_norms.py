"""Norms written out by hand become one operator; what only looks like one stays (`RecognizeNorms`)."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normfuse.graph import Graph, capture, ops, query
from normfuse.passes.canonicalize import Canonicalize
from normfuse.passes.fold_constants import FoldConstants
from normfuse.passes.presets import CANONICAL, FOLD
from normfuse.passes.recognize_norms import RecognizeNorms
from normfuse.pipeline import Pipeline
from normfuse.testing import Golden, Small, check_pass_contract, distance, picture, randomized, seeded

EXACT = 1e-12
EPS = 0.03
"""Large, so that an eps at the wrong place is seen."""
SHAPE = (3, 7, 5)


def sample(*shape: int) -> Tensor:
    return torch.randn(shape, generator=seeded(9), dtype=torch.float64) + 0.5


def canonical(model: nn.Module, x: Tensor) -> Graph:
    graph = capture(model, (x,))
    Canonicalize().run(graph)
    FoldConstants().run(graph)
    return graph


def norms(graph: Graph) -> list[str]:
    found = {ops.LAYER_NORM: "layer", ops.RMS_NORM: "rms"}
    return [found[node.target] for node in graph.nodes if query.is_call(node, *found)]


def mean(x: Tensor, axis: int = -1) -> Tensor:
    return x.mean(axis, keepdim=True)


def var(x: Tensor, axis: int = -1) -> Tensor:
    return x.var(axis, keepdim=True, correction=0)


def var_mean(x: Tensor) -> tuple[Tensor, Tensor]:
    return torch.var_mean(x, -1, correction=0, keepdim=True)  # type: ignore[no-any-return]


class LayerNorm2d(nn.Module):
    """ConvNeXt's layer norm over axis 1."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        u = x.mean(1, keepdim=True)
        s = (x - u).pow(2).mean(1, keepdim=True)
        x = (x - u) / torch.sqrt(s + EPS)
        return self.weight[:, None, None] * x + self.bias[:, None, None]


class LlamaNorm(nn.Module):
    """LLaMA's and T5's: the statistic in float32, the product in the type of the input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.float32)
        normed: Tensor = self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype)
        return normed


def test_picture(golden: Golden) -> None:
    model = randomized(nn.Sequential(nn.Conv2d(3, 5, 2), LayerNorm2d(5), nn.Flatten(2), LlamaNorm(6)))
    graph = canonical(model, sample(2, 3, 3, 4).float())
    before = graph.text()
    report = RecognizeNorms().run(graph)
    assert report.applied == {"spelled-out-norm": 2}
    assert picture(before, graph.text()) == golden


NORMS = [
    pytest.param(lambda m, x: x / torch.sqrt(mean(x * x) + EPS), "rms", id="product"),
    pytest.param(lambda m, x: x / torch.sqrt(mean(x.pow(2)) + EPS), "rms", id="power"),
    pytest.param(lambda m, x: x / torch.sqrt(mean(x.square()) + EPS), "rms", id="square"),
    pytest.param(lambda m, x: x / (mean(x**2) + EPS) ** 0.5, "rms", id="power 1/2"),
    pytest.param(lambda m, x: x * (mean(x**2) + EPS) ** -0.5, "rms", id="power -1/2"),
    pytest.param(lambda m, x: x * torch.rsqrt(mean(x**2) + EPS), "rms", id="rsqrt"),
    pytest.param(lambda m, x: torch.rsqrt(EPS + mean(x**2)) * x, "rms", id="all turned around"),
    pytest.param(lambda m, x: x * torch.rsqrt(mean(x**2) + 1), "rms", id="a whole number"),
    pytest.param(lambda m, x: x * torch.rsqrt(mean(x**2, 1) + EPS), "rms", id="another axis"),
    pytest.param(lambda m, x: x * torch.rsqrt(mean(x**2, -2) + EPS), "rms", id="another axis, from the end"),
    pytest.param(lambda m, x: (x - mean(x)) * torch.rsqrt(var(x) + EPS), "layer", id="variance"),
    pytest.param(
        lambda m, x: (x - mean(x)) / (x.var(-1, unbiased=False, keepdim=True) + EPS).sqrt(),
        "layer",
        id="unbiased=False",
    ),
    pytest.param(lambda m, x: (x - mean(x, 1)) / (var(x, -2) + EPS).sqrt(), "layer", id="variance, another axis"),
    pytest.param(lambda m, x: (d := x - mean(x)) / torch.sqrt(mean(d * d) + EPS), "layer", id="d"),
    pytest.param(lambda m, x: (d := x - mean(x, 1)) * (mean(d**2, 1) + EPS) ** -0.5, "layer", id="d, another axis"),
    pytest.param(
        lambda m, x: (x - (u := mean(x))) / torch.sqrt(mean((x - u) ** 2) + EPS), "layer", id="the difference twice"
    ),
    pytest.param(
        lambda m, x: (x - mean(x)) / torch.sqrt(mean((x - mean(x)) ** 2) + EPS), "layer", id="everything twice"
    ),
    pytest.param(
        lambda m, x: (x.mT - mean(x.mT)) / (mean((x.mT - mean(x.mT)) * (x.mT - mean(x.mT))) + EPS).sqrt(),
        "layer",
        id="everything many times, of a view",
    ),
    pytest.param(
        lambda m, x: (x - (vm := var_mean(x))[1]) / torch.sqrt(vm[0] + EPS), "layer", id="variance and mean at once"
    ),
    pytest.param(
        lambda m, x: (x - (vm := torch.var_mean(x, 1, False, True))[1]) * torch.rsqrt(vm[0] + EPS),
        "layer",
        id="variance and mean at once, unbiased=False",
    ),
    pytest.param(lambda m, x: (x - mean(x)) / (var_mean(x)[0] + EPS).sqrt(), "layer", id="of both, the variance"),
    pytest.param(lambda m, x: (x - var_mean(x)[1]) / (var(x) + EPS).sqrt(), "layer", id="of both, the mean"),
    pytest.param(lambda m, x: x * (1 / torch.sqrt(mean(x**2) + EPS)), "rms", id="one over the root"),
    pytest.param(lambda m, x: torch.reciprocal((mean(x**2) + EPS) ** 0.5) * x, "rms", id="reciprocal"),
    pytest.param(lambda m, x: (x - (u := mean(x))) / (var(x) + EPS).sqrt() + u, "layer", id="the mean read elsewhere"),
    pytest.param(lambda m, x: x / torch.sqrt((s := mean(x**2)) + EPS) + s, "rms", id="the moment read elsewhere"),
    pytest.param(lambda m, x: (d := x - mean(x)) / torch.sqrt(mean(d**2, 1) + EPS), "rms", id="centred along another"),
    pytest.param(lambda m, x: m.n(x.mT[..., None])[..., 0].mT, "layer", id="ConvNeXt"),
]


@pytest.mark.parametrize(("function", "kind"), NORMS)
def test_recognized(function: Any, kind: str) -> None:
    model, x = randomized(Small(function, n=LayerNorm2d(5))).double(), sample(*SHAPE)
    graph = canonical(model, x)
    assert norms(graph) == []
    assert check_pass_contract(RecognizeNorms(), graph, (x,)).applied == {"spelled-out-norm": 1}
    RecognizeNorms().run(graph)
    assert norms(graph) == [kind]
    assert distance(graph.run(x), [model(x)]) < EXACT
    assert distance(graph.run(x[:2] * 0.1), [model(x[:2] * 0.1)]) < EXACT


LEFT = [
    pytest.param(lambda m, x: x / (torch.sqrt(mean(x**2)) + EPS), id="eps outside the root (1)"),
    pytest.param(lambda m, x: (x - mean(x)) / (x.std(-1, keepdim=True, correction=0) + EPS), id="so with std (1)"),
    pytest.param(lambda m, x: x / torch.sqrt(mean(x**2)), id="no eps (1)"),
    pytest.param(lambda m, x: x * torch.sqrt(mean(x**2) + EPS), id="times the root (1)"),
    pytest.param(lambda m, x: x / torch.rsqrt(mean(x**2) + EPS), id="over one over the root (1)"),
    pytest.param(lambda m, x: x / (mean(x**2) + EPS) ** -0.5, id="over the power -1/2 (1)"),
    pytest.param(lambda m, x: torch.sqrt(mean(x**2) + EPS) / x, id="upside down (1)"),
    pytest.param(lambda m, x: x / (mean(x**2) + EPS), id="no root (1)"),
    pytest.param(lambda m, x: x / (mean(x**2) + EPS) ** 0.25, id="another root (1)"),
    pytest.param(lambda m, x: x / torch.sqrt(mean(x**4) + EPS), id="another moment (1)"),
    pytest.param(lambda m, x: x / torch.sqrt(mean(x.abs()) + EPS), id="the mean of magnitudes (1)"),
    pytest.param(lambda m, x: x / torch.sqrt(mean(x * x.roll(1)) + EPS), id="another product (1)"),
    pytest.param(lambda m, x: x.tanh() / torch.sqrt(mean(x**2) + EPS), id="of another tensor (1)"),
    pytest.param(lambda m, x: (x - mean(x)) / torch.sqrt(mean(x**2) + EPS), id="centred above only (1)"),
    pytest.param(lambda m, x: x / torch.sqrt(var(x) + EPS), id="centred below only (1)"),
    pytest.param(lambda m, x: x / torch.sqrt((x**2).sum(-1, keepdim=True) + EPS), id="a sum (1)"),
    pytest.param(lambda m, x: torch.div(x, (mean(x**2) + EPS).sqrt(), rounding_mode="floor"), id="rounded (1)"),
    pytest.param(lambda m, x: (x - mean(x, 1)) / torch.sqrt(var(x) + EPS), id="two axes (2)"),
    pytest.param(lambda m, x: x / torch.sqrt((x**2).mean((-1, -2), keepdim=True) + EPS), id="both axes (2)"),
    pytest.param(lambda m, x: x / torch.sqrt((x**2).mean() + EPS), id="all axes (2)"),
    pytest.param(lambda m, x: (x - mean(x, 0)) / torch.sqrt(var(x, 0) + EPS), id="the samples (2)"),
    pytest.param(lambda m, x: x * torch.rsqrt(mean(x**2, 0) + EPS), id="the samples' moment (2)"),
    pytest.param(lambda m, x: (y := x[0, :5]) / torch.sqrt((y**2).mean(-1) + EPS), id="not kept (2)"),
    pytest.param(lambda m, x: (y := x[0, :5]) / torch.sqrt((y**2).mean(1) + EPS)[None], id="kept elsewhere (2)"),
    pytest.param(lambda m, x: (x - mean(x)) / torch.sqrt(x.var(-1, keepdim=True) + EPS), id="unbiased variance (3)"),
    pytest.param(
        lambda m, x: (x - mean(x)) / torch.sqrt(x.var(-1, keepdim=True, correction=2) + EPS), id="another variance (3)"
    ),
    pytest.param(
        lambda m, x: (x - (vm := torch.var_mean(x, -1, keepdim=True))[1]) / torch.sqrt(vm[0] + EPS),
        id="unbiased variance and mean (3)",
    ),
    pytest.param(lambda m, x: (x - var_mean(x)[0]) / (var(x) + EPS).sqrt(), id="the variance taken off (1)"),
    pytest.param(lambda m, x: (x - mean(x)) / (var_mean(x)[1] + EPS).sqrt(), id="over the root of the mean (1)"),
    pytest.param(lambda m, x: (x - mean(x)) / (var_mean(x.exp())[0] + EPS).sqrt(), id="another's variance (1)"),
    pytest.param(lambda m, x: x / (1 / torch.sqrt(mean(x**2) + EPS)), id="over one over the root, computed (1)"),
    pytest.param(lambda m, x: x * (2 / torch.sqrt(mean(x**2) + EPS)), id="two over the root (1)"),
    pytest.param(lambda m, x: (x - mean(x * 2)) / (mean((x - mean(x * 3)) ** 2) + EPS).sqrt(), id="two means (1)"),
    pytest.param(lambda m, x: x / torch.sqrt(mean(x**2) + m.e), id="eps is a table (3)"),
    pytest.param(lambda m, x: x / torch.sqrt(mean(x**2) + x.exp()), id="eps is a tensor (3)"),
    pytest.param(lambda m, x: x / torch.sqrt(torch.add(mean(x**2), mean(x), alpha=2) + EPS), id="a sum below (3)"),
    pytest.param(lambda m, x: torch.sub(x, mean(x), alpha=2) / torch.sqrt(var(x) + EPS), id="alpha (3)"),
]


@pytest.mark.parametrize("function", LEFT)
def test_left_alone(function: Any) -> None:
    model, x = (
        Small(function, e=torch.tensor([[0.1], [2.0], [0.3], [1.0], [5.0], [0.5], [0.7]])).double(),
        sample(*SHAPE),
    )
    graph = canonical(model.eval(), x)
    before = graph.text()
    assert not RecognizeNorms().run(graph).changed
    assert graph.text() == before
    assert distance([out.nan_to_num() for out in graph.run(x)], [model(x).nan_to_num()]) < EXACT


@pytest.mark.parametrize("given", [torch.float16, torch.float32])
def test_a_mean_of_another_type_stays(given: torch.dtype) -> None:
    """The quotient is of the wider type; a norm would be of the type of x."""
    wider = torch.float64 if given == torch.float32 else torch.float32
    model = Small(lambda m, x: x * torch.rsqrt((x**2).mean(-1, keepdim=True, dtype=wider) + EPS))
    graph = canonical(model, x := sample(*SHAPE).to(given))
    assert not RecognizeNorms().run(graph).changed
    assert [out.dtype for out in graph.run(x)] == [wider]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_computed_in_float32_it_stays_in_float32(dtype: torch.dtype) -> None:
    model, x = randomized(LlamaNorm(5)).to(dtype), sample(*SHAPE).to(dtype)
    graph = canonical(model, x)
    RecognizeNorms().run(graph)
    assert norms(graph) == ["rms"]
    (found,), expected = graph.run(x), model(x)
    assert found.dtype == dtype
    assert next(query.dtype(node) for node in graph.nodes if query.is_call(node, ops.RMS_NORM)) == torch.float32
    # The same sums in float32: where they round the other way, the cast rounds to the neighbouring number.
    torch.testing.assert_close(found, expected, rtol=2 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_they_are_the_operators_of_torch(kind: str) -> None:
    def function(m: Any, x: Tensor) -> Tensor:
        return (x - mean(x)) / (var(x) + EPS).sqrt() if kind == "layer" else x / (mean(x**2) + EPS).sqrt()

    graph = canonical(Small(function), x := sample(*SHAPE))
    RecognizeNorms().run(graph)
    expected = F.layer_norm(x, (5,), eps=EPS) if kind == "layer" else F.rms_norm(x, (5,), eps=EPS)
    assert distance(graph.run(x), [expected]) == 0


def test_gamma_and_beta_fold_into_the_next_convolution() -> None:
    model = randomized(nn.Sequential(nn.Conv2d(3, 5, 2), LayerNorm2d(5), nn.Conv2d(5, 4, 3, padding=1))).double()
    graph = capture(model, (x := sample(2, 3, 5, 6),))
    Pipeline(phases=(CANONICAL, FOLD)).run(graph)
    assert norms(graph) == ["layer"]
    assert "affine" not in graph.text()
    assert distance(graph.run(x), [model(x)]) < 1e-10
