"""Streams are turned where the quantized network errs less for it, and nowhere else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from normfuse import rotating
from normfuse.build import FOLDING
from normfuse.export.placement import onnx_placement
from normfuse.graph import Graph, capture
from normfuse.passes.place_quantizers import PlaceQuantizers
from normfuse.passes.quantize_tables import QuantizeTables
from normfuse.pipeline import Phase
from normfuse.planning import plan_quantization
from normfuse.precision import chunked
from normfuse.progress import Silent
from normfuse.quant.bits import Bits
from normfuse.recipe import Recipe
from normfuse.report import PassReport, Reason
from normfuse.rotating import rotated_if_better
from normfuse.testing import Small, randomized, seeded

WIDTH = 32
PLACE = Phase("precision", (QuantizeTables(), PlaceQuantizers(placement=onnx_placement("avx512_vnni", Bits(8, 4)))))


def forward(m: Any, x: Tensor) -> Tensor:
    x = m.stem(x)
    x = x + m.fc2(m.fc1(m.norm(x)).relu())
    result: Tensor = m.head(m.norm(x))
    return result


def folded(loudness: float) -> Graph:
    parts = {
        "stem": nn.Linear(WIDTH, WIDTH),
        "norm": nn.RMSNorm(WIDTH),
        "fc1": nn.Linear(WIDTH, WIDTH),
        "fc2": nn.Linear(WIDTH, WIDTH),
        "head": nn.Linear(WIDTH, 5),
    }
    model = randomized(Small(forward, **parts))
    with torch.no_grad():
        model.get_submodule("stem").weight[3] *= loudness  # type: ignore[index, operator]
    graph = capture(model, (samples(2, 0),))
    FOLDING.run(graph)
    return graph


def samples(count: int, seed: int) -> Tensor:
    return torch.randn(count, WIDTH, generator=seeded(seed))


def chosen(graph: Graph) -> tuple[Graph, PassReport]:
    chunks = chunked(([x[None]] for x in samples(64, 1)), 16)
    found, reports = rotated_if_better(graph, PLACE, chunks, seed=0, progress=Silent())
    return found, reports[-1]


def test_a_loud_channel_is_turned_into_a_little_of_each() -> None:
    graph = folded(60.0)
    found, report = chosen(graph)
    assert found is not graph
    assert report.name == "judge-rotations"
    assert not report.refused
    assert report.applied == {"kept": len(report.sites)}
    assert all("fc1" in site["node"] and "affine" not in site for site in report.sites)
    x = samples(9, 2)
    torch.testing.assert_close(found.run(x), graph.run(x), rtol=0, atol=1e-4 * float(graph.run(x)[0].abs().max()))
    nearest = [rotating._nearest(each, PLACE, [(samples(64, 1),)]) for each in (graph, found)]
    before, after = (rotating.output_error(each, [(samples(64, 3),)], [graph.run(samples(64, 3))]) for each in nearest)
    assert after < 0.5 * before


def test_what_errs_more_is_left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    errors = iter([0.125, 0.25])
    monkeypatch.setattr(rotating, "output_error", lambda *_: next(errors))
    graph = folded(1.0)
    found, report = chosen(graph)
    assert found is graph
    assert [(each.reason, each.detail) for each in report.refused] == [
        (Reason.NO_GAIN, "error of the outputs 0.125 without, 0.25 with")
    ]


def test_what_cannot_turn_is_not_judged() -> None:
    parts = {"first": nn.Linear(WIDTH, WIDTH), "last": nn.Linear(WIDTH, 5)}
    graph = capture(randomized(Small(lambda m, x: m.last(m.first(x).relu()), **parts)), (samples(2, 0),))
    FOLDING.run(graph)
    found, report = chosen(graph)
    assert found is graph
    assert report.name != "judge-rotations"
    assert not report.applied


def test_the_recipe_asks_for_it() -> None:
    reports = {
        rotate: plan_quantization(
            folded(60.0),
            lambda: ([x[None]] for x in samples(32, 1)),
            recipe=Recipe(bits="w8a4", effort=0, rotate=rotate),
            placement=onnx_placement("avx512_vnni", Bits(8, 4)),
            total=32,
            progress=Silent(),
        ).passes
        for rotate in (False, True)
    }
    assert "judge-rotations" not in {report.name for report in reports[False]}
    assert "judge-rotations" in {report.name for report in reports[True]}
