"""Scales per channel are chosen by what quantized blocks make of them, on samples that did not choose."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normfuse
from normfuse.cli import render
from normfuse.export.placement import X86_VNNI
from normfuse.graph import Graph, capture, ops, query
from normfuse.graph.affine import Affine
from normfuse.page import render_page
from normfuse.passes.place_quantizers import PlaceQuantizers
from normfuse.passes.presets import CANONICAL, FOLD, LOWER
from normfuse.pipeline import Pipeline
from normfuse.planning import Plan, plan_quantization
from normfuse.precision import choose_equalizations, equalization
from normfuse.precision.equalization_offers import NOTHING, Candidate, Offer, taken
from normfuse.progress import Silent
from normfuse.quant import ChannelScales, IntegerType, SeenChannels
from normfuse.quant.placement import Placement
from normfuse.recipe import Recipe
from normfuse.rewrite.equalization import Equalization
from normfuse.testing import Small, randomized, seeded

CHANNELS, LOUD, DEAD = 12, 3, 5
W4A4 = replace(X86_VNNI, activation=IntegerType(4, signed=False), weight=IntegerType(4, signed=True))
KINDS: dict[str, Any] = {
    "relu": lambda m, x: m.o(nn.functional.gelu(m.f(m.e(x).relu()))),
    "frozen norm": lambda m, x: m.o(nn.functional.gelu(m.f((y := m.e(x)) + m.g(nn.functional.gelu(m.f(y)))))),
}


def post_norm(loud: float) -> nn.Module:
    """Return a network whose norm is read by more than linear maps; one channel is ``loud``, the others are alike."""
    parts = {"e": nn.Linear(9, CHANNELS), "n": nn.LayerNorm(CHANNELS), "f": nn.Linear(CHANNELS, 16)}
    model: Any = randomized(
        Small(
            lambda m, x: m.o(nn.functional.gelu(m.f(y := m.n(m.e(x))))) + y.tanh().mean(), **parts, o=nn.Linear(16, 5)
        )
    )
    with torch.no_grad():
        for seed, linear in enumerate((model.e, model.f)):
            nn.init.orthogonal_(linear.weight, generator=seeded(seed))
            linear.bias[:] = 0
        model.n.weight[:], model.n.bias[:] = 1, 0
        model.n.weight[LOUD] *= loud
        model.f.weight[:, LOUD] /= loud
    return model  # type: ignore[no-any-return]


def norm_read_by_many(loud: float) -> Graph:
    graph = capture(post_norm(loud), (samples(2, 0),))
    Pipeline(phases=(CANONICAL, FOLD, LOWER)).run(graph)
    return graph


def network(kind: str, loud: float) -> Graph:
    """Return a network in which one channel that a linear map reads is ``loud`` times the others, and one is zero."""
    parts = {"e": nn.Linear(9, CHANNELS), "f": nn.Linear(CHANNELS, 16), "g": nn.Linear(16, CHANNELS)}
    model: Any = randomized(Small(KINDS[kind], **parts, o=nn.Linear(16, 5)))
    with torch.no_grad():
        for linear in (model.e, model.g):
            linear.weight[LOUD] *= loud
            linear.bias[LOUD] *= loud
            linear.weight[DEAD] = linear.bias[DEAD] = 0
        model.f.weight[:, LOUD] /= loud
    graph = capture(model, (samples(2, 0),))
    Pipeline(phases=(CANONICAL, FOLD, LOWER)).run(graph)
    return graph


def samples(count: int, seed: int) -> Tensor:
    return torch.randn(count, 6, 9, generator=seeded(seed))


def choose(graph: Graph, wanted: Placement = W4A4, *, chunks: int = 8) -> dict[str, Equalization]:
    placed = graph.copy()
    PlaceQuantizers(placement=wanted).run(placed)
    return choose_equalizations(graph, placed, [(samples(8, seed),) for seed in range(1, chunks + 1)])


def free(chosen: dict[str, Equalization]) -> list[Equalization]:
    """Return those that need no product; behind GELU nothing else is possible."""
    return [found for found in chosen.values() if not found.is_product]


def planned(graph: Graph, *, equalize: bool) -> Plan:
    return plan_quantization(
        graph,
        lambda: ([x[None]] for x in samples(64, 1)),
        recipe=Recipe(bits="w4a4", effort=0, equalize=equalize),
        placement=W4A4,
        total=64,
        progress=Silent(),
    )


def error(graph: Graph, *, equalize: bool) -> float:
    found = planned(graph, equalize=equalize)
    (ours,), (true,) = found.simulated()[0].run(x := samples(64, 2)), graph.run(x)
    return float((ours - true).square().sum() / true.square().sum())


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_loud_channel_costs_little_once_it_is_equalized(kind: str) -> None:
    """Four bits over a range that one channel sets leave little of the others; other tensors err as before."""
    graph = network(kind, 100.0)
    assert error(graph, equalize=True) < 0.5 * error(graph, equalize=False)


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_loud_channel_is_divided_and_a_dead_one_stays(kind: str) -> None:
    (found,) = free(choose(network(kind, 100.0)))
    scale = found.affine.scale
    others = [channel for channel in range(CHANNELS) if channel not in (LOUD, DEAD)]
    assert float(scale[LOUD]) < 0.1 * float(scale[others].min())
    assert float(scale[DEAD]) == 1
    assert bool(scale.isfinite().all())
    assert found.after < 0.5 * found.before


def test_the_graph_is_not_changed() -> None:
    graph = network("relu", 100.0)
    text, before = graph.text(), graph.run(x := samples(3, 4))
    choose(graph)
    assert graph.text() == text
    assert torch.equal(graph.run(x)[0], before[0])


def test_what_makes_it_worse_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    def harmful(seen: SeenChannels, groups: Tensor) -> Iterator[ChannelScales]:
        scale = torch.logspace(-3, 3, seen.low.numel(), dtype=torch.float64)
        yield ChannelScales("harmful", scale, torch.zeros_like(scale))

    monkeypatch.setattr(equalization, "channel_scales", harmful)
    assert choose(network("relu", 1.0)) == {}


@pytest.mark.parametrize("judging", [1.0, 3.0])
def test_what_helps_where_it_was_chosen_only_is_not_kept(judging: float) -> None:
    """One is best on the chunks that choose; those held out decide whether it is better than nothing."""
    found = Candidate("x", 0, torch.arange(1), ["f"], offers=offers(2.0, 1.0))
    found.offers["scaled"].judging = {0: judging}
    assert bool(taken([found], {0: 2.0})) is (judging < 2.0)


@pytest.mark.parametrize("chunks", [1, 2])
def test_few_chunks_are_enough(chunks: int) -> None:
    (found,) = free(choose(network("relu", 100.0), chunks=chunks))
    assert found.after < found.before


def test_weights_alone_gain_as_well() -> None:
    """Activations stay float; rounding errors of weights that meet small channels count less."""
    wanted = replace(W4A4, activation=None, model_input=None)
    graph = network("relu", 100.0)
    for found in choose(graph, wanted).values():
        assert found.after < found.before


def test_maps_that_stay_float_choose_nothing() -> None:
    assert choose(network("relu", 100.0), replace(W4A4, smallest_inner=100)) == {}


def test_the_report_names_site_and_error() -> None:
    graph = network("relu", 100.0)
    found = planned(graph, equalize=True)
    (report,) = [report for report in found.passes if report.name == "equalize-channels"]
    (site,) = [site for site in report.sites if site["rule"] == "channels"]
    assert site["into"] == "f"
    assert site["stays"] == ""
    assert site["scales"].startswith(("largest", "rms"))
    before, after = (float(part) for part in site["error"].split(" to "))
    assert after < 0.5 * before


def test_a_product_is_taken_where_nothing_can_be_scaled() -> None:
    graph = norm_read_by_many(100.0)
    ((name, found),) = choose(graph).items()
    (node,) = [node for node in graph.nodes if node.name == name]
    assert query.is_call(node, ops.LAYER_NORM)
    assert found.is_product
    assert found.after < 0.5 * found.before
    assert float(found.affine.scale[LOUD]) == float(found.affine.scale.min())
    assert error(graph, equalize=True) < 0.5 * error(graph, equalize=False)


def test_no_product_where_channels_are_alike() -> None:
    graph = norm_read_by_many(1.0)
    assert choose(graph) == choose(graph, X86_VNNI) == {}
    assert error(graph, equalize=True) == error(graph, equalize=False)


@pytest.mark.parametrize("kind", list(KINDS))
def test_what_costs_nothing_is_preferred(kind: str) -> None:
    """The loud tensor is scaled where it is made; products stand behind GELU alone."""
    graph = network(kind, 100.0)
    chosen = choose(graph)
    products = [node for node in graph.nodes if node.name in chosen and chosen[node.name].is_product]
    assert all(query.is_call(node, ops.GELU) for node in products)
    assert len(free(chosen)) == 1


def test_weights_alone_get_no_product() -> None:
    assert choose(norm_read_by_many(100.0), replace(W4A4, activation=None, model_input=None)) == {}


@pytest.mark.slow
def test_the_engine_computes_what_the_simulation_of_a_product_does(capsys: pytest.CaptureFixture[str]) -> None:
    found = normfuse.compile(
        post_norm(100.0),
        samples(2, 0),
        calibration=samples(64, 1).numpy(),
        recipe=Recipe(equalize=True, benchmark=False, threads=1),
    )
    (report,) = [report for report in found.report["passes"] if report["name"] == "equalize-channels"]
    assert report["applied"] == {"product": 1}
    assert all(check["holds"] for check in found.report["checks"])
    assert found.report["verdict"]["ships"] == "int8"
    render.report(found.report, Path("out"))
    assert "equalized: 1 tensors" in capsys.readouterr().out
    assert "a product in front of the quantizer" in render_page(found.report)


def offers(before: float, after: float) -> dict[str, Offer]:
    affine = Affine(*torch.ones(2, 1, dtype=torch.float64), 0)
    return {
        NOTHING: Offer(affine, {}, teaching=before, judging={0: before}),
        "scaled": Offer(affine, {}, teaching=after, judging={0: after}),
    }


@pytest.mark.parametrize(("is_product", "is_taken"), [(False, True), (True, False)])
def test_a_product_has_to_pay(is_product: bool, is_taken: bool) -> None:
    """It halves the error of its own maps, but that is a tenth of the block's."""
    found = Candidate("x", 0, torch.arange(1), ["f"], is_product=is_product, offers=offers(2.0, 1.0))
    assert bool(taken([found], {0: 10.0})) is is_taken
    assert bool(taken([found], {0: 2.0}))
