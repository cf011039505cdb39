"""Activations whose zero points are 0: from the placement through ranges and learning to the engine's graph."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from normfuse.calibration import calibrate
from normfuse.export.placement import TENSORRT, with_bits
from normfuse.graph import Graph, capture
from normfuse.graph.quantization import requests
from normfuse.passes.insert_quantizers import InsertQuantizers
from normfuse.passes.place_quantizers import PlaceQuantizers
from normfuse.precision import (
    Quantization,
    chunked,
    refine_blockwise,
    refinements,
    refinements_at_once,
    round_all_to_nearest,
)
from normfuse.quant import QuantParams
from normfuse.quant.bits import Bits
from normfuse.quant.levers import Effort, Levers
from normfuse.testing import Small, randomized, seeded


def samples(count: int, seed: int) -> Tensor:
    return torch.randn(count, 12, generator=seeded(seed)) + 1  # far from symmetric


def placed(bits: Bits) -> tuple[Graph, Quantization]:
    parts = {"first": nn.Linear(12, 16), "last": nn.Linear(16, 5)}
    graph = capture(randomized(Small(lambda m, x: m.last(m.first(x).relu()), **parts)), (samples(2, 0),))
    PlaceQuantizers(placement=with_bits(TENSORRT, bits)).run(graph)
    found = calibrate(graph, lambda: ([x[None]] for x in samples(32, 1)))
    return graph, round_all_to_nearest(graph, found.by_name)


def params(found: Quantization) -> list[QuantParams]:
    return [each for each in found.activations.values() if isinstance(each, QuantParams)]


@pytest.mark.parametrize("bits", [Bits(8, 8), Bits(4, 4)])
def test_zero_points_are_0_and_every_range_has_two_equal_ends(bits: Bits) -> None:
    graph, found = placed(bits)
    assert all(request.is_symmetric and request.type.signed for request in requests(graph))
    assert len(params(found)) == 2
    assert all(not each.zero_point.any() for each in params(found))
    written = graph.copy()
    InsertQuantizers(activations=found.activations, weights=found.weights).run(written)
    x = samples(64, 2)
    (output,), (wanted,) = written.run(x), graph.run(x)
    error = float((output - wanted).square().sum() / wanted.square().sum())
    assert 0 < error < (1e-3 if bits == Bits(8, 8) else 0.1)


def test_learning_leaves_zero_points_and_moves_scales() -> None:
    graph, found = placed(Bits(4, 4))
    wide = {
        name: replace(each, scale=3 * each.scale)
        for name, each in found.activations.items()
        if isinstance(each, QuantParams)
    }
    start = replace(found, activations=wide)  # there is something to learn
    levers = Levers.of(Effort.LEARNED, Bits(4, 4))
    chunks = chunked(([x[None]] for x in samples(64, 1)), 16)
    tried, at_once = refinements(levers, seed=0), refinements_at_once(levers, seed=0)
    found, reports = refine_blockwise(graph, chunks, start, tried, at_once=at_once)
    assert any({"reconstruction", "affine tuning"} & set(report.kept) for report in reports)
    assert all(not each.zero_point.any() for each in params(found))
    before, after = (torch.stack([each.scale for each in params(each)]) for each in (start, found))
    assert not torch.equal(before, after)
