"""An affine behind a linear map goes into it, exactly, or stays for a documented reason."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from normfuse.graph import Graph, capture, ops, query
from normfuse.graph.affine import AFFINE
from normfuse.nn import IBN, RepBN, UnifiedNorm
from normfuse.passes.find_affines import FindAffines
from normfuse.passes.fold_affine_into_producers import FoldAffineIntoProducers
from normfuse.passes.presets import CANONICAL
from normfuse.pipeline import Phase, Pipeline
from normfuse.testing import Golden, Small, check_pass_contract, distance, picture, randomized, sample, seeded


def ready(model: nn.Module, x: Tensor) -> Graph:
    graph = capture(model, (x,))
    Pipeline(phases=(CANONICAL, Phase("norms", (FindAffines(),)))).run(graph)
    return graph


def conv_with_repbn() -> nn.Module:
    parts: dict[str, nn.Module] = {"conv": nn.Conv2d(4, 6, (3, 2), stride=2, padding=1, groups=2), "norm": RepBN(6)}
    return randomized(Small(lambda m, x: m.norm(m.conv(x).flatten(2).transpose(1, 2)), **parts)).double()


def test_picture(golden: Golden) -> None:
    graph = ready(conv_with_repbn(), sample(2, 4, 7, 5))
    before = graph.text()
    report = FoldAffineIntoProducers().run(graph)
    assert report.applied == {"fold-behind-linear": 1}
    (site,) = report.sites
    assert (site["affine"], site["into"], site["repair"]) == ("norm", "conv", "")
    assert site["formula"] == "W' = diag(a) W, b' = a b + c"
    assert picture(before, graph.text()) == golden


def test_numbers_and_contract() -> None:
    model, x = conv_with_repbn(), sample(2, 4, 7, 5)
    graph = ready(model, x)
    assert check_pass_contract(FoldAffineIntoProducers(), graph, (x,)).changed
    FoldAffineIntoProducers().run(graph)
    assert distance(graph.run(x), [model(x)]) < 1e-12


def test_the_bias_is_scaled_by_the_whole_scale() -> None:
    """SLAB's own script folds RepBN without eta * b; with a bias the two differ by just that (methods 2.6)."""
    model, x = conv_with_repbn(), sample(2, 4, 7, 5)
    conv: Any
    norm: Any
    conv, norm = model.conv, model.norm
    graph = ready(model, x)
    FoldAffineIntoProducers().run(graph)
    folded = dict(graph.module.named_buffers())["conv.bias"]
    scale = norm.bn.weight / torch.sqrt(norm.bn.running_var + norm.bn.eps)
    slab = scale * (conv.bias - norm.bn.running_mean) + norm.bn.bias
    torch.testing.assert_close(folded, slab + norm.alpha * conv.bias, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(folded, slab, rtol=1e-2)


LINEAR, NORM = nn.Linear(5, 3), nn.BatchNorm1d(3)
LEFT = [
    pytest.param(lambda m, x: (y := m.f(x), m.n(y)), {}, id="the linear is an output (1)"),
    pytest.param(lambda m, x: (y := m.f(x)).relu() + m.n(y), {}, id="another reader of the linear (1)"),
    pytest.param(lambda m, x: m.n((y := m.f(x)[:, None])[:, 0]) * y.exp()[:, 0], {}, id="another reader of a view (1)"),
    pytest.param(lambda m, x: torch.cat([m.n(y := m.f(x)), y], 1), {}, id="read by two parts (1)"),
    pytest.param(
        lambda m, x: m.p((y := m.g(x))[:, :3]).sum(1) * y[:, 2:].sum(1),
        {"g": nn.Linear(5, 4), "p": UnifiedNorm(3)},
        id="the other reader takes a channel of it (1)",
    ),
    pytest.param(lambda m, x: m.n(m.f(x.reshape(-1, 1, 5) * m.t)), {"t": torch.ones(3, 5)}, id="another axis (2)"),
    pytest.param(lambda m, x: m.p(m.f(x).mT.reshape(-1, 4)), {"p": UnifiedNorm(4)}, id="rows as channels (2)"),
    pytest.param(lambda m, x: m.n(nn.functional.linear(x, x[:3])), {}, id="variable weight (3)"),
    pytest.param(lambda m, x: m.n(nn.functional.linear(x, m.w, x[0, :3])), {"w": torch.ones(3, 5)}, id="bias (3)"),
    pytest.param(lambda m, x: m.n(m.f(x).relu()), {}, id="no linear"),
    pytest.param(lambda m, x: m.n(m.f(x) + x[:, :3]), {}, id="a model input in the sum"),
    pytest.param(lambda m, x: m.f(x).relu() * m.s, {"s": -torch.ones(3)}, id="relu in front of a negative scale (4)"),
    pytest.param(lambda m, x: m.n((x @ x.mT) @ m.f(x)), {}, id="a product in front of a shift"),
    pytest.param(lambda m, x: (m.f(x) @ m.f(x).mT) * m.s, {"s": torch.arange(1.0, 5)}, id="a product of two"),
    pytest.param(lambda m, x: m.n(m.f(x) + m.f(x).relu()), {}, id="a nonlinearity in the sum"),
    pytest.param(lambda m, x: m.n(torch.add(m.f(x), m.f(x), alpha=2)), {}, id="a sum with alpha"),
    pytest.param(
        lambda m, x: m.p(torch.cat([m.f(x), x], 1)), {"p": nn.BatchNorm1d(8)}, id="a model input in the concatenation"
    ),
    pytest.param(
        lambda m, x: m.n(nn.functional.max_pool1d(m.f(x[:, None]).mT, 1, 1).relu()), {}, id="behind a nonlinearity"
    ),
    pytest.param(
        lambda m, x: m.n(nn.functional.max_pool1d(m.c(x[:, None]), 2)),
        {"c": nn.Conv1d(1, 3, 2)},
        id="a maximum behind a negative scale (4)",
    ),
    pytest.param(
        lambda m, x: m.n(nn.functional.pad(m.c(x[:, None]), (1, 1))),
        {"c": nn.Conv1d(1, 3, 2)},
        id="zeros padded behind a shift (4)",
    ),
    pytest.param(
        lambda m, x: m.n(nn.functional.avg_pool1d(m.c(x[:, None]), 2, padding=1)),
        {"c": nn.Conv1d(1, 3, 2)},
        id="zeros averaged behind a shift (4)",
    ),
    pytest.param(lambda m, x: m.n(m.f(x)[:, :, None] + m.f(x)[:, None, :]), {}, id="broadcast along the channels (2)"),
]


@pytest.mark.parametrize(("function", "parts"), LEFT)
def test_left_alone(function: Any, parts: dict[str, nn.Module | Tensor]) -> None:
    model, x = randomized(Small(function, **{"f": LINEAR, "n": NORM, **parts})).double(), sample(4, 5)
    graph = ready(model, x)
    before = graph.text()
    assert not FoldAffineIntoProducers().run(graph).changed
    assert graph.text() == before
    assert sum(query.is_call(node, AFFINE) for node in graph.nodes) == 1


def test_constants_that_do_not_fit_stay_away() -> None:
    model = Small(lambda m, x: m.f(x) * 6e4, f=nn.Linear(5, 3))
    with torch.no_grad():
        model.f.weight.fill_(4.0)  # type: ignore[union-attr, operator]
    graph = ready(model.half(), sample(4, 5).half())
    assert not FoldAffineIntoProducers().run(graph).changed


THROUGH: list[Any] = [
    pytest.param(lambda m, x: m.n((m.f(x) + m.g(x)) - m.h(x)), {}, id="sums and differences"),
    pytest.param(lambda m, x: m.n((m.f(x) + m.t) - m.u), {"t": sample(4, 3), "u": sample(1, 1)}, id="tables"),
    pytest.param(lambda m, x: m.n(m.f(x) + torch.arange(12).reshape(4, 3)), {}, id="an integer table"),
    pytest.param(
        lambda m, x: m.n(torch.cat([m.g(x)[:, :2], m.h(x)[:, 2:]], 1)), {}, id="channels of two maps, concatenated"
    ),
    pytest.param(lambda m, x: m.n(torch.cat([(y := m.f(x))[:, :1], y[:, 1:]], 1)), {}, id="one map, cut and joined"),
    pytest.param(
        lambda m, x: m.n(torch.cat([(y := m.f(x) + m.t)[:, 1:], y[:, :1]], 1)),
        {"t": sample(4, 3)},
        id="map and table, cut, turned and joined",
    ),
    pytest.param(
        lambda m, x: torch.cat([m.p((y := m.f(x) + m.t)[:, :2]), m.q(y[:, 2:])], 1),
        {"f": nn.Linear(5, 4), "t": sample(4, 4), "p": UnifiedNorm(2), "q": RepBN(2)},
        id="two norms of two parts",
    ),
    pytest.param(
        lambda m, x: torch.cat([(parts := m.f(x).split([1, 2], 1))[0].relu(), m.p(parts[1])], 1),
        {"p": UnifiedNorm(2)},
        id="one part of a split",
    ),
    pytest.param(lambda m, x: m.n(m.c(x[:, None]).mean(2)), {"c": nn.Conv1d(1, 3, 2)}, id="mean of positions"),
    pytest.param(
        lambda m, x: m.n(nn.functional.interpolate(m.c(x[:, None]), 9)),
        {"c": nn.ConvTranspose1d(1, 3, 2, stride=3)},
        id="interpolation of a transposed convolution",
    ),
    pytest.param(
        lambda m, x: m.n(m.f(x)[:, :, None] + m.c(x[:, None])),
        {"c": nn.Conv1d(1, 3, 2)},
        id="broadcast along positions",
    ),
    pytest.param(
        lambda m, x: m.n(nn.functional.max_pool1d(m.c(x[:, None]), 2) * 3.0).abs(),
        {"c": nn.Conv1d(1, 3, 2), "n": nn.Identity()},
        id="a maximum behind a positive scale",
    ),
    pytest.param(lambda m, x: m.f(x).relu() * m.s, {"s": sample(3).abs()}, id="relu in front of positive scales"),
    pytest.param(lambda m, x: m.p(m.h(x).reshape(-1, 2)), {"h": nn.Linear(5, 6), "p": RepBN(2)}, id="a period"),
    pytest.param(
        lambda m, x: (x @ x.mT).softmax(-1) @ m.f(x) * m.s, {"s": sample(3)}, id="the right factor's channels"
    ),
    pytest.param(lambda m, x: m.f(x).mT @ m.g(x).exp() * m.s, {"s": sample(3, 1)}, id="the left factor's channels"),
    pytest.param(
        lambda m, x: m.n(torch.cat([m.k.expand(x.shape[0], -1, -1), m.f(x)[:, None]], 1).mT),
        {"k": sample(1, 1, 3)},
        id="class token",
    ),
]


@pytest.mark.parametrize(("function", "parts"), THROUGH)
def test_goes_through(function: Any, parts: dict[str, nn.Module | Tensor]) -> None:
    maps: dict[str, Any] = {"f": nn.Linear(5, 3), "g": nn.Linear(5, 3, bias=False), "h": nn.Linear(5, 3)}
    model, x = randomized(Small(function, **{**maps, "n": nn.BatchNorm1d(3), **parts})).double(), sample(4, 5)
    graph = ready(model, x)
    assert check_pass_contract(FoldAffineIntoProducers(), graph, (x,)).changed
    FoldAffineIntoProducers().run(graph)
    assert not any(query.is_call(node, AFFINE) for node in graph.nodes)
    assert distance(graph.run(x), [model(x)]) < 1e-12


@pytest.mark.parametrize("is_cut", [False, True])
def test_embedding_and_position_tables(is_cut: bool) -> None:
    """A table that two parts of the channels reach gets both affines; its other reader keeps the table."""

    def function(m: Any, x: Tensor) -> Tensor:
        y = m.words(x) + m.positions
        y = torch.cat([m.p(y[..., :2]), m.q(y[..., 2:])], -1) if is_cut else m.p(y)
        tied: Tensor = nn.functional.linear(y.relu(), m.words.weight)
        return tied

    parts = {"words": nn.Embedding(11, 5), "p": UnifiedNorm(2 if is_cut else 5), "q": UnifiedNorm(3)}
    model = randomized(Small(function, **parts, positions=nn.Parameter(torch.zeros(1, 7, 5)))).double()
    x = torch.randint(0, 11, (2, 7), generator=seeded(2))
    graph = ready(model, x)
    assert FoldAffineIntoProducers().run(graph).applied == {"fold-behind-linear": 2 if is_cut else 1}
    assert not any(query.is_call(node, AFFINE) for node in graph.nodes)
    assert distance(graph.run(x), [model(x)]) < 1e-12


def test_ibn_folds_into_the_rows_of_its_half() -> None:
    model = randomized(Small(lambda m, x: m.n(m.f(x)), f=nn.Conv2d(3, 7, 3, padding=1), n=IBN(7, ratio=0.4))).double()
    graph = ready(model, x := sample(2, 3, 5, 4))
    old: Any = model.f
    FoldAffineIntoProducers().run(graph)
    left = [node for node in graph.nodes if query.is_call(node, AFFINE)]
    assert all(query.is_call(node.args[0], ops.INSTANCE_NORM) for node in left)  # gamma and beta of the other half
    weight = dict(graph.module.named_buffers())["f.weight"]
    assert torch.equal(weight[:2], old.weight[:2])
    assert not torch.allclose(weight[2:], old.weight[2:])
    assert distance(graph.run(x), [model(x)]) < 1e-12


def test_the_other_reader_of_a_weight_keeps_it() -> None:
    model = randomized(Small(lambda m, x: m.n(m.f(x)) * m.f(x.relu()), f=nn.Linear(5, 3), n=nn.BatchNorm1d(3)))
    model, x = model.double(), sample(4, 5)
    graph = ready(model, x)
    original = {path: tensor.clone() for path, tensor in graph.module.named_buffers() if path.startswith("f.")}
    FoldAffineIntoProducers().run(graph)
    constants = dict(graph.module.named_buffers())
    assert all(torch.equal(constants[path], tensor) for path, tensor in original.items())
    assert {"f.weight_1", "f.bias_1"} <= constants.keys()
    assert distance(graph.run(x), [model(x)]) < 1e-12


def test_a_shared_bias_keeps_its_other_reader() -> None:
    def function(m: Any, x: Tensor) -> Tensor:
        product: Tensor = m.n(nn.functional.linear(x, m.v, m.b)) * nn.functional.linear(x, m.w, m.b)
        return product

    parts = {"v": sample(3, 5), "w": sample(3, 5) + 1, "b": sample(3)}
    model = randomized(Small(function, n=nn.BatchNorm1d(3), **parts)).double()
    graph, x = ready(model, sample(4, 5)), sample(4, 5)
    FoldAffineIntoProducers().run(graph)
    assert distance(graph.run(x), [model(x)]) < 1e-12
