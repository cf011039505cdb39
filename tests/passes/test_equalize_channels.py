"""Channels are scaled where they are made and back where they are read, exactly, or stay for a documented reason."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from normfuse.graph import Graph, capture, ops, query
from normfuse.graph.affine import AFFINE, Affine
from normfuse.graph.edit import editing
from normfuse.passes.equalize_channels import EqualizeChannels
from normfuse.passes.lower_affines import LowerAffines
from normfuse.passes.presets import CANONICAL, FOLD, LOWER
from normfuse.pipeline import Fact, Phase, Pipeline
from normfuse.report import Reason
from normfuse.rewrite.equalization import Equalization, Site, groupings, read_by_maps
from normfuse.testing import Golden, Small, check_pass_contract, distance, picture, randomized, sample, seeded

EXACT = 1e-11
"""Scales from 1e-4 to 1e4 in float64: 1e8 eps, for a handful of operators."""


def folded(model: nn.Module, x: Tensor) -> Graph:
    graph = capture(model, (x,))
    Pipeline(phases=(CANONICAL, FOLD, LOWER)).run(graph)
    return graph


def loud(count: int) -> Tensor:
    """Positive scales of eight decades, one of them exactly 1."""
    exponents = torch.rand(count, generator=seeded(3), dtype=torch.float64) * 8 - 4
    exponents[0] = 0
    return 10**exponents


def chosen(
    graph: Graph, node: Any, *, is_shifted: bool = False, groups: Tensor | None = None, is_product: bool = False
) -> EqualizeChannels:
    """The pass with random scales (and shifts) for one tensor that linear maps read."""
    axis = read_by_maps(graph)[node]
    count = int(query.shape(node)[axis])
    groups = torch.arange(count) if groups is None else groups
    shift = sample(count)[groups] if is_shifted else torch.zeros(count, dtype=torch.float64)
    found = Equalization(
        affine=Affine(loud(count)[groups], shift, axis), how="random", before=2.0, after=1.0, is_product=is_product
    )
    return EqualizeChannels(chosen={node.name: found})


def last_read(graph: Graph) -> Any:
    """What the last linear map of the graph reads."""
    return list(read_by_maps(graph))[-1]


def attention(m: Any, x: Tensor) -> Tensor:
    def heads(y: Tensor) -> Tensor:
        return y.reshape(-1, 5, 2, 3).transpose(1, 2)

    y = F.scaled_dot_product_attention(heads(m.f(x)), heads(m.g(x)), heads(m.h(x)))
    result: Tensor = m.o(y.transpose(1, 2).reshape(-1, 5, 6))
    return result


def stream(m: Any, x: Tensor) -> Tensor:
    """Norms with frozen statistics: folded, every linear map reads the stream itself."""
    y = torch.cat([m.k.expand(x.shape[0], -1, -1), m.e(x)], 1) + m.p
    y = y + m.b(F.gelu(m.a(m.n1(y.mT).mT)))
    y = y + m.d(F.gelu(m.c(m.n2(y.mT).mT)))
    result: Tensor = m.o(y[:, 0])
    return result


TOKENS, IMAGE = (4, 5, 7), (2, 3, 8, 6)
LINEARS: dict[str, Any] = {"f": nn.Linear(7, 6), "g": nn.Linear(7, 6), "h": nn.Linear(7, 6), "o": nn.Linear(6, 9)}
STREAM: dict[str, Any] = {
    **{"e": nn.Linear(7, 6), "k": sample(1, 1, 6), "p": sample(1, 6, 6)},
    **{"a": nn.Linear(6, 11), "b": nn.Linear(11, 6), "c": nn.Linear(6, 13), "d": nn.Linear(13, 6, bias=False)},
    **{"n1": nn.BatchNorm1d(6), "n2": nn.BatchNorm1d(6), "o": nn.Linear(6, 3)},
}
CONVOLUTIONS: dict[str, Any] = {"c": nn.Conv2d(3, 6, 3, padding=1), "d": nn.Conv2d(6, 4, 3, groups=2)}

SITES: list[Any] = [
    pytest.param(TOKENS, lambda m, x: m.o(m.f(x).relu()), {}, id="linear, relu, linear"),
    pytest.param(TOKENS, lambda m, x: m.o((m.f(x) - m.g(x)).mT.relu().mT), {}, id="a difference, relu between views"),
    pytest.param(IMAGE, lambda m, x: m.d(F.max_pool2d(m.c(x).relu(), 2)), CONVOLUTIONS, id="convolutions, pooling"),
    pytest.param(
        IMAGE,
        lambda m, x: m.d(F.pad(F.avg_pool2d(m.n(m.c(x)).relu(), 2, padding=1), (1, 1, 1, 1))),
        {**CONVOLUTIONS, "n": nn.BatchNorm2d(6)},
        id="batch norm, zeros averaged and padded",
    ),
    pytest.param(
        IMAGE,
        lambda m, x: m.d(m.c(x).relu()),
        {"c": nn.ConvTranspose2d(3, 6, 2), "d": nn.ConvTranspose2d(6, 4, 2, groups=2)},
        id="transposed convolutions",
    ),
    pytest.param(
        IMAGE,
        lambda m, x: m.d(m.c(x).relu()) + m.q(m.c(x).relu().mean((2, 3)))[..., None, None],
        {"c": nn.Conv2d(3, 6, 1), "d": nn.Conv2d(6, 4, 1), "q": nn.Linear(6, 4)},
        id="two of one kind",
    ),
    pytest.param(TOKENS, lambda m, x: m.o(y := m.f(x)) * m.e(y), {"e": nn.Linear(6, 9)}, id="no relu"),
]


def exactly(shape: tuple[int, ...], function: Any, parts: dict[str, Any]) -> tuple[Graph, nn.Module, Tensor]:
    model, x = randomized(Small(function, **{**LINEARS, **parts})).double(), sample(*shape)
    return folded(model, x), model, x


def check_exact(graph: Graph, step: EqualizeChannels, model: nn.Module, x: Tensor) -> None:
    """Check the contract, the outputs, and that the tensor is what it was to become."""
    assert check_pass_contract(step, graph, (x,)).changed
    ((name, wanted),) = step.chosen.items()
    before, now = dict[str, Tensor](), dict[str, Tensor]()
    graph.run_watched((x,), lambda node, value: before.setdefault(node.name, value))
    readers = {reader.name for node in graph.nodes if node.name == name for reader in query.readers(node)}
    report = step.run(graph)
    assert report.applied == {"channels": 1}
    LowerAffines().run(graph)
    assert not any(query.is_call(node, AFFINE) for node in graph.nodes)
    assert distance(graph.run(x), [model(x)]) < EXACT
    reads = {node.name: node.args[0].name for node in graph.nodes if node.name in readers}  # type: ignore[union-attr]
    graph.run_watched((x,), lambda node, value: now.setdefault(node.name, value))
    affine = wanted.affine
    expected = AFFINE(before[name], affine.scale, affine.shift, affine.axis)
    for source in reads.values():
        assert distance([now[source]], [expected]) < EXACT


@pytest.mark.parametrize(("shape", "function", "parts"), SITES)
def test_scales(shape: tuple[int, ...], function: Any, parts: dict[str, Any]) -> None:
    graph, model, x = exactly(shape, function, parts)
    check_exact(graph, chosen(graph, last_read(graph)), model, x)


SHIFTED: list[Any] = [
    pytest.param(lambda m, x: m.o(y := m.f(x)) * m.e(y), {"e": nn.Linear(6, 9)}, id="no relu"),
    pytest.param(
        lambda m, x: m.f(y := m.n(x)) * m.g(y) + m.h(y), {"n": nn.LayerNorm(7)}, id="layer norm and three readers"
    ),
    pytest.param(lambda m, x: m.o(m.n(m.f(x))), {"n": nn.LayerNorm(6, elementwise_affine=False)}, id="bare layer norm"),
]


@pytest.mark.parametrize(("function", "parts"), SHIFTED)
def test_scales_and_shifts(function: Any, parts: dict[str, Any]) -> None:
    graph, model, x = exactly(TOKENS, function, parts)
    check_exact(graph, chosen(graph, last_read(graph), is_shifted=True), model, x)


def test_a_norm_takes_them_as_gamma_and_beta() -> None:
    graph, _, _ = exactly(TOKENS, lambda m, x: m.f(m.n(x)), {"n": nn.LayerNorm(7)})
    step = chosen(graph, last_read(graph), is_shifted=True)
    calls = [node.target for node in graph.nodes if node.op == "call_function"]
    step.run(graph)
    LowerAffines().run(graph)
    assert [node.target for node in graph.nodes if node.op == "call_function"] == calls
    (norm,) = [node for node in graph.nodes if query.is_call(node, ops.LAYER_NORM)]
    (wanted,) = step.chosen.values()
    gamma, beta = (query.constant(graph, node) for node in norm.args[2:4])  # type: ignore[arg-type]
    assert torch.equal(gamma, wanted.affine.scale)
    assert torch.equal(beta, wanted.affine.shift)


def test_an_rms_norm_takes_scales() -> None:
    graph, model, x = exactly(TOKENS, lambda m, x: m.f(m.n(x)) + m.g(x), {"n": nn.RMSNorm(7)})
    (norm,) = [node for node in read_by_maps(graph) if query.is_call(node, ops.RMS_NORM)]
    check_exact(graph, chosen(graph, norm), model, x)


def grouped(graph: Graph, node: fx.Node, axis: int, channels: int) -> Tensor:
    """Return which channels of a tensor must share their numbers."""
    with editing(graph) as edit:
        site = Site(edit, node)
        groups = groupings(site, axis, channels)
        site.leave()
    assert isinstance(groups, Tensor)
    return groups


def test_values_and_their_projection_share_the_scales_of_heads() -> None:
    graph, model, x = exactly(TOKENS, attention, {})
    node = last_read(graph)
    groups = grouped(graph, node, 2, 6)
    assert groups.tolist() == [0, 1, 2, 0, 1, 2]
    check_exact(graph, chosen(graph, node, groups=groups), model, x)


def test_a_flattened_map_has_one_scale_per_channel() -> None:
    parts = {"c": nn.Conv2d(3, 6, 3), "q": nn.Linear(144, 4)}
    graph, model, x = exactly(IMAGE, lambda m, x: m.q(m.c(x).relu().flatten(1)), parts)
    node = last_read(graph)
    groups = grouped(graph, node, 1, 144)
    assert groups.tolist() == [channel for channel in range(6) for _ in range(24)]
    check_exact(graph, chosen(graph, node, groups=groups), model, x)


@pytest.mark.parametrize("is_shifted", [False, True])
def test_a_stream_between_frozen_norms_is_scaled_as_a_whole(is_shifted: bool) -> None:
    graph, model, x = exactly(TOKENS, stream, STREAM)
    node = list(read_by_maps(graph))[1]
    step = chosen(graph, node, is_shifted=is_shifted)
    check_exact(graph, step, model, x)


def test_a_stream_says_what_it_went_into() -> None:
    graph, _, _ = exactly(TOKENS, stream, STREAM)
    node = list(read_by_maps(graph))[1]
    (site,) = chosen(graph, node).run(graph).sites
    assert site["into"] == "a, c, o"
    assert (site["scales"], site["error"]) == ("random", "2 to 1")


GRAPH_OUTPUT, NONLINEAR = Reason.GRAPH_OUTPUT, Reason.NONLINEAR_READER
LEFT: list[Any] = [
    pytest.param(lambda m, x: (m.o(y := m.f(x).relu()), y.exp()), {}, False, NONLINEAR, id="another reader (2)"),
    pytest.param(lambda m, x: (m.o(y := m.f(x).relu()), y), {}, False, GRAPH_OUTPUT, id="an output (2)"),
    pytest.param(lambda m, x: m.o(F.gelu(m.f(x))), {}, False, Reason.NO_LINEAR, id="gelu (1)"),
    pytest.param(lambda m, x: m.o((y := m.f(x)).relu()) + y.sum(), {}, False, Reason.SHARED, id="made for two (1)"),
    pytest.param(lambda m, x: m.o(m.f(x).relu()), {}, True, NONLINEAR, id="a shift in front of relu (1)"),
    pytest.param(lambda m, x: m.f(x), {}, False, Reason.MODEL_INPUT, id="an input (1)"),
    pytest.param(lambda m, x: m.f(m.n(x)), {"n": nn.RMSNorm(7)}, True, Reason.NO_LINEAR, id="RMS norm: no shift (1)"),
    pytest.param(
        lambda m, x: (m.o(y := m.n(m.f(x))), y), {"n": nn.LayerNorm(6)}, False, Reason.NO_LINEAR, id="its own gamma (1)"
    ),
    pytest.param(
        lambda m, x: F.conv1d(m.c(x), m.d.weight, padding=1),
        {"c": nn.Conv1d(5, 6, 1), "d": nn.Conv1d(6, 4, 3)},
        True,
        Reason.ZERO_PADDING,
        id="zeros padded behind a shift (3)",
    ),
]


@pytest.mark.parametrize(("function", "parts", "is_shifted", "reason"), LEFT)
def test_left_alone(function: Any, parts: dict[str, Any], is_shifted: bool, reason: Reason) -> None:
    graph, model, x = exactly(TOKENS, function, parts)
    before, constants = graph.text(), dict(graph.module.named_buffers())
    step = chosen(graph, last_read(graph), is_shifted=is_shifted)
    report = step.run(graph)
    assert not report.changed
    assert [refusal.reason for refusal in report.refused] == [reason]
    assert graph.text() == before
    assert all(tensor is constants[name] for name, tensor in graph.module.named_buffers())
    assert not check_pass_contract(step, graph, (x,)).changed
    expected = model(x)
    assert distance(graph.run(x), list(expected) if isinstance(expected, tuple) else [expected]) < EXACT


@pytest.mark.parametrize("scale", [0.0, -1.0])
def test_scales_that_are_not_positive_are_refused(scale: float) -> None:
    graph, _, _ = exactly(TOKENS, lambda m, x: m.o(m.f(x).relu()), {})
    node, vector = last_read(graph), torch.ones(6, dtype=torch.float64)
    vector[2] = scale
    found = Equalization(affine=Affine(vector, torch.zeros_like(vector), 2), how="wrong", before=2.0, after=1.0)
    report = EqualizeChannels(chosen={node.name: found}).run(graph)
    assert [refusal.reason for refusal in report.refused] == [Reason.NEGATIVE_SCALE]


def test_constants_that_do_not_fit_are_refused() -> None:
    graph, _, _ = exactly(TOKENS, lambda m, x: m.o(m.f(x).relu()), {})
    model = randomized(Small(lambda m, x: m.o(m.f(x).relu()), **LINEARS)).half()
    graph = folded(model, sample(*TOKENS).half())
    node, vector = last_read(graph), torch.full((6,), 1e-6, dtype=torch.float64)
    found = Equalization(affine=Affine(vector, torch.zeros_like(vector), 2), how="wrong", before=2.0, after=1.0)
    report = EqualizeChannels(chosen={node.name: found}).run(graph)
    assert [refusal.reason for refusal in report.refused] == [Reason.OVERFLOW]


def test_picture(golden: Golden) -> None:
    parts = {"n": nn.LayerNorm(7), "f": nn.Linear(7, 6), "o": nn.Linear(6, 9)}
    graph, _, _ = exactly(TOKENS, lambda m, x: m.o(m.f(m.n(x)).relu()), parts)
    before = graph.text()
    norm, relu = read_by_maps(graph)
    steps = (chosen(graph, norm, is_shifted=True), chosen(graph, relu))
    step = EqualizeChannels(chosen={**steps[0].chosen, **steps[1].chosen})
    assert step.run(graph).applied == {"channels": 2}
    assert picture(before, graph.text()) == golden


def post_norm(m: Any, x: Tensor) -> Tensor:
    """The norm's output is the residual stream, and GELU's has a nonlinear maker: nothing can be scaled."""
    y = m.n(x)
    result: Tensor = m.n2(y + m.o(F.gelu(m.f(y))) + m.o(F.gelu(m.g(y))))
    return result


POST_NORM: dict[str, Any] = {"n": nn.LayerNorm(7), "n2": nn.LayerNorm(7), "o": nn.Linear(6, 7)}


@pytest.mark.parametrize("index", [0, 1], ids=["the stream, read by two maps and a sum", "gelu"])
def test_a_product_scales_what_maps_read_and_nothing_else(index: int) -> None:
    graph, model, x = exactly(TOKENS, post_norm, POST_NORM)
    node = list(read_by_maps(graph))[index]
    others = {reader.name for reader in query.readers(node) if not query.is_call(reader, ops.LINEAR)}
    step = chosen(graph, node, is_product=True)
    assert check_pass_contract(step, graph, (x,)).changed
    report = step.run(graph)
    assert report.applied == {"product": 1}
    LowerAffines().run(graph)
    (product,) = [reader for reader in query.readers(node) if query.is_call(reader, ops.MUL)]
    assert all(query.is_call(reader, ops.LINEAR) for reader in query.readers(product))
    assert {reader.name for reader in query.readers(node)} - {product.name} == others
    scale = query.constant(graph, product.args[1])  # type: ignore[arg-type]
    assert torch.equal(scale.flatten(), step.chosen[node.name].affine.scale)
    assert distance(graph.run(x), [model(x)]) < EXACT
    (site,) = report.sites
    assert (site["rule"], site["stays"]) == ("product", "a product in front of the quantizer")


def test_no_pass_that_folds_takes_a_product_away_from_its_readers() -> None:
    """Folding once more must not go wrong: gelu's product has nowhere to go but back into what reads it."""
    graph, model, x = exactly(TOKENS, post_norm, POST_NORM)
    steps = [chosen(graph, node, is_product=True) for node in list(read_by_maps(graph))[:2]]
    EqualizeChannels(chosen={**steps[0].chosen, **steps[1].chosen}).run(graph)
    Pipeline(phases=(LOWER,), given=frozenset({Fact.FOLDED, Fact.AFFINES})).run(graph)
    again = graph.copy()
    Pipeline(phases=(CANONICAL, FOLD, LOWER)).run(again)
    assert distance(graph.run(x), [model(x)]) < EXACT
    assert distance(again.run(x), [model(x)]) < EXACT


PRODUCTS_LEFT: list[Any] = [
    pytest.param(TOKENS, lambda m, x: m.o(F.gelu(m.f(x))), {}, True, Reason.NO_LINEAR, id="a shift (4)"),
    pytest.param(IMAGE, lambda m, x: m.d(F.gelu(m.c(x))), CONVOLUTIONS, False, Reason.NO_LINEAR, id="convolutions (4)"),
]


@pytest.mark.parametrize(("shape", "function", "parts", "is_shifted", "reason"), PRODUCTS_LEFT)
def test_products_left_alone(
    shape: tuple[int, ...], function: Any, parts: dict[str, Any], is_shifted: bool, reason: Reason
) -> None:
    graph, model, x = exactly(shape, function, parts)
    before = graph.text()
    report = chosen(graph, last_read(graph), is_shifted=is_shifted, is_product=True).run(graph)
    assert [refusal.reason for refusal in report.refused] == [reason]
    assert not report.changed
    assert graph.text() == before
    assert distance(graph.run(x), [model(x)]) < EXACT


def test_a_product_that_does_not_fit_is_refused() -> None:
    graph = folded(randomized(Small(lambda m, x: m.o(F.gelu(m.f(x))), **LINEARS)).half(), sample(*TOKENS).half())
    node, vector = last_read(graph), torch.full((6,), 1e6, dtype=torch.float64)
    affine = Affine(vector, torch.zeros_like(vector), 2)
    found = Equalization(affine=affine, how="wrong", before=2.0, after=1.0, is_product=True)
    report = EqualizeChannels(chosen={node.name: found}).run(graph)
    assert [refusal.reason for refusal in report.refused] == [Reason.OVERFLOW]


def test_picture_of_a_product(golden: Golden) -> None:
    graph, _, _ = exactly(TOKENS, lambda m, x: m.f(y := m.n(x)) + y.tanh().mean(), {"n": nn.LayerNorm(7)})
    before = graph.text()
    assert chosen(graph, last_read(graph), is_product=True).run(graph).applied == {"product": 1}
    assert picture(before, graph.text()) == golden


def test_nothing_is_chosen() -> None:
    graph, _, _ = exactly(TOKENS, lambda m, x: m.o(m.f(x).relu()), {})
    before = graph.text()
    Pipeline(phases=(Phase("equalization", (EqualizeChannels(chosen={}),)),), given=EqualizeChannels.requires).run(
        graph
    )
    assert graph.text() == before
