"""Products of attention read one scale per head and logarithmic probabilities where that is better, and only there."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from normfuse.export.placement import onnx_placement
from normfuse.graph import Graph, capture, ops, query
from normfuse.graph.quantization import requests
from normfuse.graph.segments import run_segment, segments
from normfuse.passes.insert_quantizers import InsertQuantizers
from normfuse.passes.place_quantizers import PlaceQuantizers
from normfuse.precision import Quantization, refine_blockwise, refinements, round_all_to_nearest
from normfuse.precision.block import Block
from normfuse.precision.simulation import Simulation
from normfuse.quant import LogarithmicParams, PerChannel, QuantParams, Range
from normfuse.quant.bits import Bits
from normfuse.quant.granularity import PER_TENSOR
from normfuse.quant.levers import Effort, Levers
from normfuse.testing import Small, randomized, seeded

BITS = Bits(8, 3)
SIZES = (0.2, 1.0, 3.0)
"""How large the three heads are: one scale cannot serve them all."""


def attention(m: Any, x: Tensor) -> Tensor:
    q, k, v = (part(x).unflatten(-1, (3, 8)).transpose(1, 2) for part in (m.q, m.k, m.v))
    sizes = torch.tensor(SIZES).reshape(3, 1, 1)
    weights = (q * sizes @ k.mT).softmax(-1)
    result: Tensor = m.out((weights @ (v * sizes)).transpose(1, 2).flatten(2))
    return result


def decided(placement: Any) -> tuple[Graph, Quantization]:
    model = Small(attention, **{name: nn.Linear(24, 24) for name in ("q", "k", "v", "out")})
    graph = capture(randomized(model), (tokens(2, 0),))
    PlaceQuantizers(placement=placement).run(graph)
    ranges, sources = dict[str, Range](), {request.source for request in requests(graph)}

    def watch(node: Any, value: Any) -> Any:
        if node in sources:
            ranges[node.name] = Range(float(value.min()), float(value.max()))
        return value

    graph.run_watched((tokens(64, 1),), watch)
    return graph, round_all_to_nearest(graph, ranges)


def tokens(count: int, seed: int) -> Tensor:
    return torch.randn(count, 11, 24, generator=seeded(seed))


def refined(placement: Any, effort: Effort) -> tuple[Graph, Quantization, dict[str, float], dict[str, float]]:
    graph, start = decided(placement)
    tried = refinements(Levers.of(effort, BITS), seed=0, placement=placement)
    chunks = [(x,) for x in tokens(96, 1).split(16)]
    found, reports = refine_blockwise(graph, chunks, start, tried)
    kept, reverted = dict[str, float](), dict[str, float]()
    for report in reports:
        kept |= report.kept
        reverted |= report.reverted
    return graph, found, kept, reverted


def placed(**changes: bool) -> Any:
    return replace(onnx_placement("avx512_vnni", BITS), attention_operands=True, **changes)


def error(graph: Graph, found: Quantization) -> float:
    x, written = tokens(64, 2), graph.copy()
    InsertQuantizers(activations=found.activations, weights=found.weights).run(written)
    (output,), (wanted,) = written.run(x), graph.run(x)
    return float((output - wanted).square().sum() / wanted.square().sum())


@pytest.mark.parametrize(
    ("changes", "names"),
    [({"head_scales": True}, {"head scales"}), ({"logarithmic_softmax": True}, {"log2 codes", "log sqrt 2 codes"})],
)
def test_each_choice_lowers_the_error_on_other_samples(changes: dict[str, bool], names: set[str]) -> None:
    graph, plain, _, _ = refined(placed(), Effort.CLOSED_FORM)
    _, better, kept, _ = refined(placed(**changes), Effort.CLOSED_FORM)
    assert kept.keys() & names
    assert error(graph, better) < 0.97 * error(graph, plain)


def test_what_does_not_help_is_reverted() -> None:
    _, found, kept, reverted = refined(placed(head_scales=True, logarithmic_softmax=True), Effort.CLOSED_FORM)
    tried = {"log2 codes", "log sqrt 2 codes"}
    assert (kept | reverted).keys() >= tried
    has_logarithm = any(isinstance(params, LogarithmicParams) for params in found.activations.values())
    assert has_logarithm == bool(kept.keys() & tried)


def everywhere(effort: Effort) -> tuple[Graph, Quantization]:
    """Return a graph whose operands all have the other codes, whether they help or not, learned where asked for."""
    graph, start = decided(placed(head_scales=True, logarithmic_softmax=True))
    tried = refinements(Levers.of(effort, BITS), seed=0, placement=placed(head_scales=True, logarithmic_softmax=True))
    chunks = [(x,) for x in tokens(96, 1).split(16)]
    found = start

    def forced(block: Block, decided: Quantization) -> Quantization:
        nonlocal found
        found = decided
        for name, refine in tried.items():
            if name != "log2 codes":
                found = refine(block, found)
        return found

    refine_blockwise(graph, chunks, start, {"forced": forced})
    return graph, found


def test_maps_and_probabilities_get_what_they_can_read() -> None:
    graph, found = everywhere(Effort.LEARNED)
    by_reader = [
        (reader, found.activations[request.source.name]) for request in requests(graph) for reader in request.readers
    ]
    assert {type(params) for _, params in by_reader} == {QuantParams, LogarithmicParams}
    for reader, params in by_reader:
        assert params.granularity == (PerChannel(1) if query.is_call(reader, ops.MATMUL) else PER_TENSOR)


def test_nothing_is_tried_where_the_placement_has_no_such_codes() -> None:
    names = {"head scales", "log2 codes", "log sqrt 2 codes"}
    for placement in (None, onnx_placement("avx512_vnni", BITS), placed()):
        assert not names & refinements(Levers.of(Effort.LEARNED, BITS), seed=0, placement=placement).keys()


@pytest.mark.parametrize("effort", [Effort.CLOSED_FORM, Effort.LEARNED])
def test_the_simulation_is_the_quantized_graph(effort: Effort) -> None:
    graph, found = everywhere(effort)
    x, written = tokens(7, 5), graph.copy()
    InsertQuantizers(activations=found.activations, weights=found.weights).run(written)
    (part,) = segments(graph, wanted=lambda node: False)
    values: dict[Any, Any] = {graph.inputs[0]: x}
    run_segment(graph, part, values, Simulation(found))
    (exact,), (output,) = graph.run(x), written.run(x)
    simulated = values[graph.outputs[0]]
    # Biases are int32 codes there and floats here: a code at a tie may fall to the other side.
    assert (simulated - output).abs().median() < 1e-3 * output.abs().max()
    assert (simulated - output).square().sum() < 0.05 * (simulated - exact).square().sum()


def test_sentences_of_different_lengths_have_scales_too() -> None:
    placement = placed(head_scales=True, logarithmic_softmax=True)
    model = randomized(Small(attention, **{name: nn.Linear(24, 24) for name in ("q", "k", "v", "out")})).eval()
    free = {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}
    graph = capture(torch.export.export(model, (tokens(2, 0),), dynamic_shapes=(free,), strict=False))
    PlaceQuantizers(placement=placement).run(graph)
    ranges = {request.source.name: Range(-4.0, 4.0) for request in requests(graph)}
    start = round_all_to_nearest(graph, ranges)
    chunks = [(tokens(16, 1)[:, :length],) for length in (5, 7, 9, 11)]
    tried = refinements(Levers.of(Effort.CLOSED_FORM, BITS), seed=0, placement=placement)
    _, reports = refine_blockwise(graph, chunks, start, tried)
    assert any("head scales" in report.kept for report in reports)
