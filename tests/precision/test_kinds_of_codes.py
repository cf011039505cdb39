"""Zero points of weights and scales of rows through every method that decides about codes."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn

from normfuse.export.placement import onnx_placement
from normfuse.graph import Graph, capture
from normfuse.graph.quantization import requested_weights, requests
from normfuse.passes.insert_quantizers import InsertQuantizers
from normfuse.passes.place_quantizers import PlaceQuantizers
from normfuse.precision import Quantization, refine_blockwise, round_all_to_nearest
from normfuse.precision.decision_record import decision_from_record, decision_record
from normfuse.precision.error_feedback import ErrorFeedback, correct_biases, feed_back_errors
from normfuse.precision.learned_weight import KeptCodes, LearnedWeight, MovedWeight
from normfuse.precision.put_back import Decided, put_back, quantized_blocks
from normfuse.precision.reconstruction import Reconstruction, reconstruct
from normfuse.precision.simulation import Simulation
from normfuse.precision.soft_rounding import SoftlyRounded
from normfuse.quant import DynamicParams, round_to_nearest
from normfuse.quant.bits import Bits
from normfuse.quant.code_kinds import ActivationCodes, WeightCodes
from normfuse.quant.integer_type import IntegerType
from normfuse.testing import randomized, seeded

DYNAMIC, STATIC = ActivationCodes.DYNAMIC, ActivationCodes.STATIC
ASYMMETRIC, SYMMETRIC = WeightCodes.ASYMMETRIC, WeightCodes.SYMMETRIC


def placed(bits: str, activations: ActivationCodes, weights: WeightCodes) -> tuple[Graph, list[tuple[Tensor, ...]]]:
    """Return a tiny MLP with weights that are not centred, with requests, and samples."""
    torch.manual_seed(0)
    model = randomized(nn.Sequential(nn.Linear(48, 64), nn.GELU(), nn.Linear(64, 7)))
    with torch.no_grad():
        for layer in (model[0], model[2]):
            layer.weight.add_(1.5 * layer.weight.std())
    x = torch.randn(512, 48, generator=seeded(5))
    x[:, :5] *= 8  # so that inputs do not count alike
    graph = capture(model, (x[:2],))
    placement = onnx_placement("avx512_vnni", Bits.parse(bits), activations=activations, weights=weights)
    PlaceQuantizers(placement=placement).run(graph)
    return graph, [(part,) for part in torch.split(x, 16)]


def error(graph: Graph, decided: Quantization, chunks: list[tuple[Tensor, ...]]) -> float:
    simulation = Simulation(decided)
    with torch.no_grad():
        pairs = [(graph.run_as(chunk, simulation)[0], graph.run(*chunk)[0]) for chunk in chunks]
    return float(sum((found - wanted).square().sum() for found, wanted in pairs))


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("group", [None, 16])
def test_zero_points_halve_the_steps_of_weights_of_one_sign(bits: int, group: int | None) -> None:
    weight, kind = torch.rand(9, 80, generator=seeded(1)) + 0.05, IntegerType(bits, signed=True)
    errors = [
        float(
            (round_to_nearest(weight, None, kind, input_scale=None, group=group, is_symmetric=each).values - weight)
            .square()
            .sum()
        )
        for each in (True, False)
    ]
    # Half the step is a quarter of the squared error; clipping helps the coarser grid more.
    assert errors[1] < 0.4 * errors[0]
    shifted = round_to_nearest(-weight, None, kind, input_scale=None, group=group, is_symmetric=False)
    assert bool((shifted.params.zero_point == kind.maximum).all())


@pytest.mark.parametrize(
    ("bits", "activations"), [("w3a16", STATIC), ("w2a16", STATIC), ("w3a8", DYNAMIC), ("w4a8", DYNAMIC)]
)
def test_each_method_is_no_worse_with_zero_points(bits: str, activations: ActivationCodes) -> None:
    found = {}
    for weights in (SYMMETRIC, ASYMMETRIC):
        graph, chunks = placed(bits, activations, weights)
        nearest = round_all_to_nearest(graph, {})
        tried = {
            "error feedback": partial(feed_back_errors, chosen=ErrorFeedback()),
            "bias correction": correct_biases,
        }
        refined, _ = refine_blockwise(graph, chunks, nearest, tried)
        found[weights] = error(graph, nearest, chunks), error(graph, refined, chunks)
        assert found[weights][1] < 0.8 * found[weights][0], "feeding errors back helps either way"
    for before, after in zip(found[SYMMETRIC], found[ASYMMETRIC], strict=True):
        assert after < 0.7 * before, "weights off centre"


@pytest.mark.parametrize("kind", [MovedWeight, SoftlyRounded, KeptCodes])
@pytest.mark.parametrize("group", [None, 16])
def test_learning_starts_at_the_nearest_codes_beside_their_zero_points(
    kind: type[LearnedWeight], group: int | None
) -> None:
    weight = torch.rand(9, 80, generator=seeded(1)) + 0.05
    start = round_to_nearest(
        weight, None, IntegerType(3, signed=True), input_scale=None, group=group, is_symmetric=False
    )
    learned = kind(start, weight)
    assert torch.equal(learned.rounded(None).codes, start.codes)
    ends = [start.params.granularity.spread(end, weight.shape) for end in (start.params.smallest, start.params.largest)]
    wanted = start.values if kind is not SoftlyRounded else weight.double().clamp(*ends).float()
    torch.testing.assert_close(learned.values(), wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("activations", [STATIC, DYNAMIC])
def test_what_is_learned_is_what_the_codes_stand_for(activations: ActivationCodes) -> None:
    graph, chunks = placed("w3a8" if activations is DYNAMIC else "w3a16", activations, ASYMMETRIC)
    nearest = round_all_to_nearest(graph, {})
    learn = partial(reconstruct, chosen=Reconstruction(steps=60))
    refined, reports = refine_blockwise(graph, chunks, nearest, {"reconstruction": learn})
    assert any(report.kept for report in reports), "it helps on samples held out"
    assert error(graph, refined, chunks) < 0.9 * error(graph, nearest, chunks)
    for name, weight in refined.weights.items():
        assert torch.equal(weight.params.zero_point, nearest.weights[name].params.zero_point)
        assert int(weight.codes.min()) >= weight.params.type.minimum
        assert int(weight.codes.max()) <= weight.params.type.maximum


@pytest.mark.parametrize("activations", [STATIC, DYNAMIC])
def test_the_graph_computes_the_simulation(activations: ActivationCodes) -> None:
    graph, chunks = placed("w4a8" if activations is DYNAMIC else "w4a16", activations, ASYMMETRIC)
    decided = round_all_to_nearest(graph, {})
    wanted = graph.run_as(chunks[0], Simulation(decided))[0]
    report = InsertQuantizers(activations=decided.activations, weights=decided.weights).run(graph)
    assert not report.refused
    torch.testing.assert_close(graph.run(*chunks[0])[0], wanted, rtol=0, atol=1e-6 * float(wanted.abs().max()))


def test_a_decision_survives_being_written() -> None:
    graph, chunks = placed("w4a8", DYNAMIC, ASYMMETRIC)
    decided = round_all_to_nearest(graph, {})
    again = decision_from_record(*decision_record(decided))
    assert again.activations == decided.activations
    assert set(again.activations.values()) == {DynamicParams(size=16), DynamicParams(size=64)}
    assert error(graph, again, chunks) == error(graph, decided, chunks)
    assert again.kinds == decided.kinds


def test_a_block_put_back_to_eight_bits_keeps_its_groups() -> None:
    graph, chunks = placed("w2a8", DYNAMIC, ASYMMETRIC)
    decided = Decided(graph=graph, ranges={}, quantization=round_all_to_nearest(graph, {}))
    wider = onnx_placement("avx512_vnni", Bits(8, 8), activations=DYNAMIC, weights=ASYMMETRIC)
    found = decided
    for block in quantized_blocks(graph):
        found = put_back(found, block, wider)
    assert [(asked.type.bits, asked.group) for asked in requested_weights(found.graph).values()] == [(8, 16), (8, 64)]
    assert [request.group for request in requests(found.graph)] == [16, 64]
    before, after = (error(each.graph, each.quantization, chunks) for each in (decided, found))
    assert after < 0.05 * before
