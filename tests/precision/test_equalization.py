"""Scales per channel are chosen by what quantized blocks make of them, on samples that did not choose."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from normfuse.export.placement import X86_VNNI
from normfuse.graph import Graph, capture
from normfuse.passes.place_quantizers import PlaceQuantizers
from normfuse.passes.presets import CANONICAL, FOLD, LOWER
from normfuse.pipeline import Pipeline
from normfuse.planning import plan_quantization
from normfuse.precision import choose_equalizations, equalization
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


def error(graph: Graph, *, equalize: bool) -> float:
    found = plan_quantization(
        graph,
        lambda: ([x[None]] for x in samples(64, 1)),
        recipe=Recipe(bits="w4a4", effort=0, equalize=equalize),
        placement=W4A4,
        total=64,
        progress=Silent(),
    )
    (ours,), (true,) = found.simulated()[0].run(x := samples(64, 2)), graph.run(x)
    return float((ours - true).square().sum() / true.square().sum())


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_loud_channel_costs_little_once_it_is_equalized(kind: str) -> None:
    """Four bits over a range that one channel sets leave little of the others; other tensors err as before."""
    graph = network(kind, 100.0)
    assert error(graph, equalize=True) < 0.5 * error(graph, equalize=False)


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_loud_channel_is_divided_and_a_dead_one_stays(kind: str) -> None:
    ((_, found),) = choose(network(kind, 100.0)).items()
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


def test_what_helps_where_it_was_chosen_only_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """One is best on the chunks that choose; those held out say that it is worse than nothing."""
    original = equalization._Judge._add

    def add(self: Any, offer: Any, *given: Any) -> None:
        original(self, offer, *given)
        is_unscaled = bool((offer.affine.scale == 1).all())
        offer.teaching, offer.judging = (2.0, 1.0) if is_unscaled else (1.0, 2.0)

    monkeypatch.setattr(equalization._Judge, "_add", add)
    assert choose(network("relu", 100.0)) == {}


@pytest.mark.parametrize("chunks", [1, 2])
def test_few_chunks_are_enough(chunks: int) -> None:
    ((_, found),) = choose(network("relu", 100.0), chunks=chunks).items()
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
    found = plan_quantization(
        graph,
        lambda: ([x[None]] for x in samples(64, 1)),
        recipe=Recipe(bits="w4a4", effort=0, equalize=True),
        placement=W4A4,
        total=64,
        progress=Silent(),
    )
    (report,) = [report for report in found.passes if report.name == "equalize-channels"]
    (site,) = report.sites
    assert (site["node"], site["into"]) == (next(iter(choose(graph))), "f")
    assert site["scales"].startswith(("largest", "rms"))
    before, after = (float(part) for part in site["error"].split(" to "))
    assert after < 0.5 * before
