"""Linear maps that are added, or applied in a row, become one, or stay for a documented reason."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normfuse.graph import Graph, capture, query
from normfuse.graph.affine import AFFINE
from normfuse.nn import RepBN
from normfuse.passes.find_affines import FindAffines
from normfuse.passes.fold_affine_into_consumers import FoldAffineIntoConsumers
from normfuse.passes.fold_affine_into_producers import FoldAffineIntoProducers
from normfuse.passes.merge_linear_maps import MergeLinearMaps
from normfuse.passes.presets import CANONICAL
from normfuse.pipeline import Phase, Pipeline
from normfuse.report import Reason
from normfuse.rewrite.linear_map import LINEAR_MAPS
from normfuse.testing import (
    Golden,
    Small,
    check_pass_contract,
    distance,
    fold_tolerance,
    picture,
    randomized,
    sample,
)

EXACT = 1e-12
TOKENS, IMAGE = (3, 7, 5), (2, 3, 8, 9)
SUM, CHAIN = "sum-of-linear-maps", "chain-of-linear-maps"


def ready(model: nn.Module, x: Tensor) -> Graph:
    graph = capture(model, (x,))
    steps = (FindAffines(), FoldAffineIntoProducers(), FoldAffineIntoConsumers())
    Pipeline(phases=(CANONICAL, Phase("norms", steps))).run(graph)
    return graph


def maps(graph: Graph) -> int:
    """Return the number of linear maps, affines among them."""
    return sum(query.is_call(node, AFFINE, *LINEAR_MAPS) for node in graph.nodes)


class Adapter(nn.Module):
    """LoRA: ``W x + b + s B (A x)``, and dropout, which is nothing in eval mode."""

    def __init__(self, inputs: int, outputs: int, *, rank: int = 2) -> None:
        super().__init__()
        self.base, self.drop = nn.Linear(inputs, outputs), nn.Dropout(0.3)
        self.a, self.b = nn.Linear(inputs, rank, bias=False), nn.Linear(rank, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.base(x) + self.b(self.a(self.drop(x))) * 0.25
        return result


class RepVGG(nn.Module):
    """Three branches with their batch norms: 3x3, 1x1 and the image itself."""

    def __init__(self, width: int, *, stride: int = 1) -> None:
        super().__init__()
        self.large = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.small = nn.Conv2d(width, width, 1, stride, bias=False)
        self.norms = nn.ModuleList([nn.BatchNorm2d(width) for _ in range(3)])
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        y = self.norms[0](self.large(x)) + self.norms[1](self.small(x))
        result: Tensor = y + self.norms[2](x) if self.stride == 1 else y
        return result


def test_picture(golden: Golden) -> None:
    model = randomized(nn.Sequential(Adapter(5, 6), nn.Tanh(), nn.Linear(6, 9), nn.Linear(9, 4, bias=False)))
    graph = ready(model, sample(*TOKENS).float())
    before = graph.text()
    report = MergeLinearMaps().run(graph)
    assert report.applied == {SUM: 1, CHAIN: 1}
    assert [(site["affine"], site["into"]) for site in report.sites] == [("0.base + 0.b", "0.base"), ("3", "2")]
    assert picture(before, graph.text()) == golden


def linears() -> dict[str, Any]:
    return {
        "f": nn.Linear(5, 4),
        "g": nn.Linear(5, 4, bias=False),
        "h": nn.Linear(5, 9),
        "k": nn.Linear(9, 4),
        "low": nn.Linear(5, 2, bias=False),
        "high": nn.Linear(2, 4),
    }


def convolutions(*kinds: Any, **options: Any) -> dict[str, Any]:
    """Return convolutions ``a``, ``b``, ...; of each the kernel, the padding and what else it says."""
    return {
        name: nn.Conv2d(3, 4, kernel, padding=padding, **{**options, **more})
        for name, (kernel, padding, more) in zip("abc", kinds, strict=False)
    }


def after(inner: Any, outer: Any) -> dict[str, Any]:
    return {"a": inner, "b": outer}


MERGED = [
    pytest.param(lambda m, x: m.f(x) + m.g(x), TOKENS, linears(), [SUM], id="two (1)"),
    pytest.param(lambda m, x: m.g(x) + m.g(x), TOKENS, linears(), [SUM], id="one layer twice (1)"),
    pytest.param(lambda m, x: m.f(x) + m.g(x) + m.t(x), TOKENS, {**linears(), "t": nn.Linear(5, 4)}, [SUM] * 2, id="3"),
    pytest.param(lambda m, x: m.f(x) * 0.5 + m.g(x) * m.s, TOKENS, {**linears(), "s": sample(4)}, [SUM], id="scaled"),
    pytest.param(lambda m, x: m.l(x), TOKENS, {"l": Adapter(5, 4)}, [SUM], id="an adapter (2)"),
    pytest.param(lambda m, x: m.l(x), TOKENS, {"l": Adapter(5, 4, rank=1)}, [SUM], id="of rank one (2)"),
    pytest.param(lambda m, x: m.high(m.low(x)) + m.f(x), TOKENS, linears(), [SUM], id="the adapter first (2)"),
    pytest.param(lambda m, x: m.f(x) + m.high(m.low(x)), TOKENS, linears(), [SUM], id="its second map has a bias (2)"),
    pytest.param(
        lambda m, x: m.f(x) + x @ m.p @ m.q * 2,
        TOKENS,
        {**linears(), "p": sample(5, 2), "q": sample(2, 4)},
        [SUM],
        id="@",
    ),
    pytest.param(lambda m, x: m.f(x) - m.high(m.low(x)), TOKENS, linears(), [SUM], id="an adapter taken off (2)"),
    pytest.param(lambda m, x: m.high(m.low(x)) - m.f(x), TOKENS, linears(), [SUM], id="taken off an adapter (2)"),
    pytest.param(lambda m, x: torch.add(m.f(x), m.g(x), alpha=2), TOKENS, linears(), [SUM], id="alpha (1)"),
    pytest.param(
        lambda m, x: torch.sub(m.f(x), m.high(m.low(x)), alpha=0.5), TOKENS, linears(), [SUM], id="alpha, off (2)"
    ),
    pytest.param(
        lambda m, x: m.low(x) + m.f(x) + m.g(x), TOKENS, {**linears(), "low": nn.Linear(5, 4)}, [SUM] * 2, id="three"
    ),
    pytest.param(
        lambda m, x: m.f(x) - (x * m.s + m.t),
        TOKENS,
        {"f": nn.Linear(5, 5), "s": sample(5), "t": sample(5)},
        [SUM],
        id="an affine taken off (4)",
    ),
    pytest.param(lambda m, x: x * 0.5 + m.f(x), TOKENS, {"f": nn.Linear(5, 5, bias=False)}, [SUM], id="a number (4)"),
    pytest.param(
        lambda m, x: m.n(x) + m.a(x),
        IMAGE,
        {"n": nn.BatchNorm2d(3), "a": nn.Conv2d(3, 3, 1)},
        [SUM],
        id="the image beside a 1x1 (4)",
    ),
    pytest.param(
        lambda m, x: m.a(x) + m.n(x),
        IMAGE,
        {"n": nn.BatchNorm2d(3), "a": nn.Conv2d(3, 3, (5, 3), padding=(4, 1), dilation=(2, 1))},
        [SUM],
        id="the image beside a dilated 5x3 (4)",
    ),
    pytest.param(lambda m, x: m.k(m.h(x)), TOKENS, linears(), [CHAIN], id="a chain (3)"),
    pytest.param(
        lambda m, x: m.k(m.t(m.h(x))), TOKENS, {**linears(), "t": nn.Linear(9, 9)}, [CHAIN] * 2, id="a longer one (3)"
    ),
    pytest.param(lambda m, x: m.r(x), IMAGE, {"r": RepVGG(3)}, [SUM] * 2, id="RepVGG (1, 4)"),
    pytest.param(lambda m, x: m.r(x), IMAGE, {"r": RepVGG(3, stride=2)}, [SUM], id="RepVGG, strided (1)"),
    pytest.param(
        lambda m, x: m.a(x) + m.b(x), IMAGE, convolutions((1, 0, {}), (5, 2, {"bias": False})), [SUM], id="1x1 + 5x5"
    ),
    pytest.param(
        lambda m, x: m.a(x) + m.b(x),
        IMAGE,
        convolutions(((5, 3), (2, 1), {}), ((1, 3), (0, 1), {})),
        [SUM],
        id="5x3 + 1x3",
    ),
    pytest.param(lambda m, x: m.a(x) + m.b(x), IMAGE, convolutions((4, 1, {}), (2, 0, {})), [SUM], id="4x4 + 2x2"),
    pytest.param(
        lambda m, x: m.a(x) + m.b(x),
        IMAGE,
        convolutions((3, 2, {"dilation": 2}), (1, 0, {})),
        [SUM],
        id="dilated + 1x1",
    ),
    pytest.param(
        lambda m, x: m.a(x) + m.b(x), IMAGE, convolutions((3, "same", {}), (1, "valid", {})), [SUM], id="by a word"
    ),
    pytest.param(
        lambda m, x: m.b(m.a(x)),
        IMAGE,
        after(nn.Conv2d(3, 16, 3, 2, padding=1), nn.Conv2d(16, 4, 1)),
        [CHAIN],
        id="3x3, then 1x1 (3)",
    ),
    pytest.param(
        lambda m, x: m.c(x) + m.b(m.a(x)),
        IMAGE,
        {"c": nn.Conv2d(3, 4, 3, padding=1), **after(nn.Conv2d(3, 2, 3, padding=1), nn.Conv2d(2, 4, 1))},
        [SUM],
        id="an adapter of a convolution (2)",
    ),
]


@pytest.mark.parametrize(("function", "shape", "parts", "rules"), MERGED)
def test_merged(function: Any, shape: tuple[int, ...], parts: dict[str, Any], rules: list[str]) -> None:
    model, x = randomized(Small(function, **parts)).double(), sample(*shape)
    graph = ready(model, x)
    many = maps(graph)
    report = check_pass_contract(MergeLinearMaps(), graph, (x,))
    assert sum(report.applied.values()) == len(rules)
    assert set(report.applied) == set(rules)
    MergeLinearMaps().run(graph)
    assert maps(graph) == 1 < many
    assert distance(graph.run(x), [model(x)]) < EXACT
    assert distance(graph.run(x[:1]), [model(x[:1])]) < EXACT


LEFT = [
    pytest.param(lambda m, x: m.f(x) + m.g(x.sin()), TOKENS, linears(), id="of two tensors (1)"),
    pytest.param(lambda m, x: m.f(x) * m.g(x), TOKENS, linears(), id="a product (1)"),
    pytest.param(lambda m, x: (y := m.f(x)) + y, TOKENS, linears(), id="one map, added to itself (1)"),
    pytest.param(lambda m, x: m.f(x) + m.t(x), TOKENS, {**linears(), "t": nn.Linear(5, 1)}, id="one for all (1)"),
    pytest.param(lambda m, x: m.f(x) + F.linear(x, x[0, :4]), TOKENS, linears(), id="a variable map (1)"),
    pytest.param(lambda m, x: m.f(x) + m.g(x).relu(), TOKENS, linears(), id="a nonlinearity (1)"),
    pytest.param(lambda m, x: m.f(x) + m.g(x.mT.reshape(x.shape)), TOKENS, linears(), id="a view (1)"),
    pytest.param(lambda m, x: (m.f(x) + (y := m.g(x)), y), TOKENS, linears(), id="a branch is an output"),
    pytest.param(lambda m, x: (y := m.f(x)).relu() + (y + m.g(x)), TOKENS, linears(), id="a branch is read elsewhere"),
    pytest.param(lambda m, x: m.k(y := m.h(x)).sin() + y[..., :4], TOKENS, linears(), id="the first is read elsewhere"),
    pytest.param(lambda m, x: m.k(m.h(x).relu()), TOKENS, linears(), id="a nonlinearity between (3)"),
    pytest.param(lambda m, x: m.high(m.low(x)), TOKENS, linears(), id="one map costs more than two (3)"),
    pytest.param(
        lambda m, x: m.b(m.a(x)), TOKENS, after(nn.Linear(5, 4), nn.Linear(4, 20)), id="it costs as much as two (3)"
    ),
    pytest.param(
        lambda m, x: F.linear(m.h(x), m.v), TOKENS, {**linears(), "v": sample(9)}, id="a vector as weight (3)"
    ),
    pytest.param(
        lambda m, x: F.linear(x, m.v) + F.linear(x, m.w), TOKENS, {"v": sample(5), "w": sample(5)}, id="two vectors (1)"
    ),
    *(
        pytest.param(lambda m, x: m.a(x) + m.b(x), (2, 3, 9, 9), convolutions(first, second, **options), id=name)
        for name, first, second, options in (
            ("another place of the kernel (1)", (3, 0, {}), (1, 0, {}), {"stride": 3}),
            ("a middle between pixels (1)", (3, 1, {}), (2, 1, {}), {"stride": 2}),
            ("another stride (1)", (5, 0, {}), (1, 0, {"stride": 2}), {}),
            ("another dilation (1)", (3, 2, {"dilation": 2}), (3, 1, {}), {}),
            ("another dilation along one axis (1)", ((3, 1), (2, 0), {"dilation": 2}), ((3, 1), (1, 0), {}), {}),
            ("crossed kernels (1)", ((3, 1), (1, 0), {}), ((1, 3), (0, 1), {}), {}),
            ("words that pad one side (1)", (4, "same", {}), (2, "same", {}), {}),
        )
    ),
    pytest.param(
        lambda m, x: m.a(x) + m.b(x),
        IMAGE,
        after(nn.Conv2d(3, 6, 3, padding=1, groups=3), nn.Conv2d(3, 6, 1)),
        id="groups (1)",
    ),
    pytest.param(
        lambda m, x: m.b(m.a(x)), IMAGE, after(nn.Conv2d(3, 9, 3, groups=3), nn.Conv2d(9, 2, 1)), id="groups first (3)"
    ),
    pytest.param(
        lambda m, x: m.b(m.a(x)), IMAGE, after(nn.Conv2d(3, 9, 3), nn.Conv2d(9, 3, 1, groups=3)), id="groups last (3)"
    ),
    pytest.param(
        lambda m, x: m.b(m.a(x)), IMAGE, after(nn.Conv2d(3, 9, 1), nn.Conv2d(9, 2, 3)), id="1x1, then 3x3 (3)"
    ),
    pytest.param(
        lambda m, x: m.b(m.a(x)),
        IMAGE,
        after(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 2, 1, padding=1)),
        id="a padded 1x1 (3)",
    ),
    pytest.param(
        lambda m, x: m.b(m.a(x)),
        IMAGE,
        after(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 2, 1, stride=2)),
        id="a strided 1x1 (3)",
    ),
    pytest.param(
        lambda m, x: m.b(m.a(x)), IMAGE, after(nn.ConvTranspose2d(3, 16, 2), nn.Conv2d(16, 2, 1)), id="transposed (3)"
    ),
    pytest.param(
        lambda m, x: m.a(x) + m.b(x),
        IMAGE,
        after(nn.ConvTranspose2d(3, 4, 1), nn.Conv2d(3, 4, 1)),
        id="of two kinds (1)",
    ),
]


@pytest.mark.parametrize(("function", "shape", "parts"), LEFT)
def test_left_alone(function: Any, shape: tuple[int, ...], parts: dict[str, Any]) -> None:
    model, x = randomized(Small(function, **parts)).double(), sample(*shape)
    graph = ready(model, x)
    before = graph.text()
    assert not MergeLinearMaps().run(graph).changed
    assert graph.text() == before
    expected = model(x)
    assert distance(graph.run(x), list(expected) if isinstance(expected, tuple) else [expected]) < EXACT


def test_other_readers_keep_the_weights() -> None:
    model = randomized(Small(lambda m, x: m.f(x) + m.g(x) * 2 + m.f(x.sin()).cos(), **linears())).double()
    graph = ready(model, x := sample(*TOKENS))
    assert check_pass_contract(MergeLinearMaps(), graph, (x,)).applied == {SUM: 1}
    MergeLinearMaps().run(graph)
    assert distance(graph.run(x), [model(x)]) < EXACT


REFUSED = [
    pytest.param(lambda m, x: (m.f(x) + (y := m.g(x)), y), TOKENS, linears(), Reason.SHARED, id="an output too"),
    pytest.param(
        lambda m, x: m.f(x) + m.high(m.low(x)),
        TOKENS,
        {"f": nn.Linear(5, 4, bias=False), "low": nn.Linear(5, 4), "high": nn.Linear(4, 4)},
        None,
        id="an adapter of a high rank is merged",
    ),
    pytest.param(
        lambda m, x: m.b(m.a(x)) + m.d(m.c(x)),
        (3, 7, 9),
        {**after(nn.Linear(9, 2), nn.Linear(2, 8)), "c": nn.Linear(9, 2), "d": nn.Linear(2, 8)},
        Reason.MORE_WORK,
        id="two chains of a low rank",
    ),
    pytest.param(
        lambda m, x: m.n(x) + m.b(m.a(x)),
        (3, 7, 9),
        {"n": RepBN(9), **after(nn.Linear(9, 2), nn.Linear(2, 9))},
        Reason.MORE_WORK,
        id="an affine beside a chain of a low rank",
    ),
    pytest.param(
        lambda m, x: m.a(x) - m.n(x),
        IMAGE,
        {"n": nn.BatchNorm2d(3), "a": nn.Conv2d(3, 3, 3, padding=1, groups=3)},
        Reason.GROUPED,
        id="groups",
    ),
    pytest.param(
        lambda m, x: m.a(x) + m.n(x),
        (1, 3, 4, 4),
        {"n": nn.BatchNorm2d(3), "a": nn.Conv2d(3, 3, 5, padding=4, stride=2)},
        Reason.GEOMETRY,
        id="a stride",
    ),
]


@pytest.mark.parametrize(("function", "shape", "parts", "reason"), REFUSED)
def test_maps_of_one_tensor_that_stay_say_why(
    function: Any, shape: tuple[int, ...], parts: dict[str, Any], reason: Reason | None
) -> None:
    model, x = randomized(Small(function, **parts)).double(), sample(*shape)
    graph = ready(model, x)
    report = MergeLinearMaps().run(graph)
    assert [refusal.reason for refusal in report.refused] == ([reason] if reason else [])
    assert report.changed == (reason is None)


@pytest.mark.parametrize("name", ["middle", "sum", "order"])
def test_the_naive_merges_are_wrong(name: str) -> None:
    """The small kernel in a corner, biases of one branch only, A B for B A."""
    model: nn.Module
    if name == "order":
        model, x = randomized(Adapter(5, 5, rank=5)).double(), sample(*TOKENS)
    else:
        model, x = (
            randomized(Small(lambda m, x: m.a(x) + m.b(x), **convolutions((3, 1, {}), (1, 0, {})))),
            sample(*IMAGE),
        )
    graph = ready(model.double(), x)
    MergeLinearMaps().run(graph)
    parameters = dict(model.named_parameters())
    constants = dict(graph.module.named_buffers())
    (weight,), (bias,) = ([constants[key] for key in constants if kind in key] for kind in ("weight", "bias"))
    assert distance(graph.run(x), [model(x)]) < EXACT
    with torch.no_grad():
        if name == "sum":
            bias.copy_(parameters["a.bias"])
        elif name == "middle":
            weight.copy_(parameters["a.weight"] + F.pad(parameters["b.weight"], (0, 2, 0, 2)))
        else:
            weight.copy_(parameters["base.weight"] + 0.25 * parameters["a.weight"] @ parameters["b.weight"])
    assert distance(graph.run(x), [model(x)]) > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_other_types_differ_by_rounding(dtype: torch.dtype) -> None:
    model = randomized(nn.Sequential(Adapter(5, 6), nn.Tanh(), nn.Linear(6, 9), nn.Linear(9, 4))).to(dtype)
    graph = ready(model, x := sample(*TOKENS).to(dtype))
    tolerance = fold_tolerance(graph, x)
    MergeLinearMaps().run(graph)
    torch.testing.assert_close(graph.run(x)[0], model(x).detach(), rtol=0, atol=tolerance)


@pytest.mark.parametrize("is_sum", [True, False])
def test_constants_that_do_not_fit_stay_away(is_sum: bool) -> None:
    parts: dict[str, Any] = (
        after(nn.Linear(5, 4), nn.Linear(5, 4)) if is_sum else after(nn.Linear(5, 9), nn.Linear(9, 4))
    )
    model = Small(lambda m, x: m.a(x) + m.b(x) if is_sum else m.b(m.a(x)), **parts)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.0 if parameter.ndim == 1 else 4e4 if is_sum else 300.0)
    graph = ready(model.half(), x := sample(*TOKENS).half() * 1e-3)
    assert not MergeLinearMaps().run(graph).changed
    assert maps(graph) == 2
    assert bool(graph.run(x)[0].isfinite().all())
