"""Blocks are refined against the float network: simulated as they will be, kept where they are better."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from normfuse.export.placement import X86_VNNI
from normfuse.graph import Graph, capture
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
from normfuse.precision.block import Block
from normfuse.precision.error_feedback import refit_affines
from normfuse.precision.reconstruction import Reconstruction, Rounding, reconstruct
from normfuse.precision.simulation import Simulation
from normfuse.quant import IntegerType
from normfuse.quant.bits import Bits
from normfuse.quant.levers import Effort, Levers
from normfuse.testing import Small, distance, observed_ranges, randomized, seeded


def network(m: Any, x: Tensor) -> Tensor:
    x = m.stem(x).relu().flatten(2).mT
    x = x + m.fc2(nn.functional.gelu(m.fc1(x)))
    x = x + m.fc4(torch.tanh(m.fc3(x)))
    result: Tensor = m.head(x.mean(1))
    return result


def model() -> nn.Module:
    parts = {
        "stem": nn.Conv2d(3, 8, 3, stride=2, padding=1),
        "fc1": nn.Linear(8, 24),
        "fc2": nn.Linear(24, 8, bias=False),
        "fc3": nn.Linear(8, 24),
        "fc4": nn.Linear(24, 8),
        "head": nn.Linear(8, 5),
    }
    return randomized(Small(network, **parts))


def images(count: int, seed: int) -> Tensor:
    """Images whose rows depend on each other, as inputs of trained networks do."""
    smooth = torch.randn(count, 3, 12, 12, generator=seeded(seed)).cumsum(-1).cumsum(-2)
    return smooth / 6


def decided(bits: str) -> tuple[Graph, Quantization]:
    graph, precision = capture(model(), (images(2, 0),)), Bits.parse(bits)
    activation = None if precision.is_weight_only else IntegerType(precision.activation, signed=False)
    weight = IntegerType(precision.weight, signed=True)
    PlaceQuantizers(placement=replace(X86_VNNI, activation=activation, weight=weight)).run(graph)
    ranges = observed_ranges(graph, images(64, 1))
    return graph, round_all_to_nearest(graph, ranges)


def inserted(graph: Graph, found: Quantization) -> Graph:
    graph = graph.copy()
    InsertQuantizers(activations=found.activations, weights=found.weights).run(graph)
    return graph


def error(graph: Graph, found: Quantization, x: Tensor) -> float:
    (output,), (wanted,) = inserted(graph, found).run(x), graph.run(x)
    return float((output - wanted).square().sum() / wanted.square().sum())


@pytest.mark.parametrize("bits", ["8", "w4a8", "w3a16"])
def test_the_simulation_is_the_quantized_graph(bits: str) -> None:
    graph, found = decided(bits)
    x = images(7, 5)
    (simulated,) = graph.run_as([x], Simulation(found))
    (written,), (exact,) = inserted(graph, found).run(x), graph.run(x)
    # The graph holds biases as int32 codes, the simulation as floats, so a code at a tie may fall to the other side:
    # samples that met none agree to the rounding of a bias, the rest to a code; the float network agrees nowhere.
    assert agreeing(simulated, written) >= 4 / 7
    assert agreeing(exact, written) == 0
    assert distance([simulated], [written]) < 0.5 * distance([exact], [written])


def agreeing(one: Tensor, other: Tensor) -> float:
    """Return the share of samples whose every number agrees to a thousandth of the largest."""
    return float(((one - other).abs().amax(1) < 1e-3 * other.abs().max()).float().mean())


@pytest.mark.slow
@pytest.mark.parametrize("bits", ["w3a8", "w4a4", "w3a16", "w2a8"])
@pytest.mark.parametrize("effort", [Effort.CLOSED_FORM, Effort.LEARNED])
def test_each_effort_lowers_the_error_on_other_samples(bits: str, effort: Effort) -> None:
    graph, start = decided(bits)
    tried = refinements(Levers.of(effort, Bits.parse(bits)), seed=0)
    found, reports = refine_blockwise(graph, chunked(((x[None],) for x in images(128, 1)), 16), start, tried)
    assert error(graph, found, images(64, 2)) < 0.9 * error(graph, start, images(64, 2))
    assert len(reports) == 4
    for report in reports:
        assert set(report.kept) | set(report.reverted) == set(tried)
        assert min([report.before, *report.kept.values()]) <= min([report.before, *report.reverted.values()])


@pytest.mark.parametrize("rounding", [Rounding.STRAIGHT_THROUGH, Rounding.SOFT])
def test_blocks_are_reconstructed_under_either_rounding(rounding: Rounding) -> None:
    graph, start = decided("w3a8")
    learned = partial(reconstruct, chosen=Reconstruction(rounding=rounding, steps=100))
    chunks = chunked(((x[None],) for x in images(128, 1)), 16)
    found, reports = refine_blockwise(graph, chunks, start, {"reconstruction": learned})
    assert error(graph, found, images(64, 2)) < 0.9 * error(graph, start, images(64, 2))
    assert any(report.kept for report in reports)


def test_tuning_the_network_at_once_keeps_every_code_and_helps() -> None:
    graph, start = decided("w3a4")
    chunks = chunked(((x[None],) for x in images(128, 1)), 16)
    at_once = refinements_at_once(Levers(affine_tuning=True), seed=0)
    found, (*_, report) = refine_blockwise(graph, chunks, start, {}, at_once=at_once)
    assert report.exits == tuple(node.name for node in graph.outputs)
    assert report.kept["affine tuning"] < 0.9 * report.before
    assert error(graph, found, images(64, 2)) < 0.9 * error(graph, start, images(64, 2))
    for name, weight in start.weights.items():
        assert torch.equal(found.weights[name].codes, weight.codes)
        assert not torch.equal(found.weights[name].params.scale, weight.params.scale)


def test_the_refit_is_the_least_squares_affine_of_every_output() -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(12, 4), torch.randn(64, 12)
    graph = capture(Small(lambda m, x: m.layer(x), layer=layer), (x[:2],))
    PlaceQuantizers(placement=replace(X86_VNNI, activation=None, weight=IntegerType(3, signed=True))).run(graph)
    start = round_all_to_nearest(graph, {})
    found, (report,) = refine_blockwise(graph, [(x,), (x,)], start, {"affine refit": refit_affines})
    assert report.kept
    (weight,), (before,) = found.weights.values(), start.weights.values()
    assert torch.equal(weight.codes, before.codes)
    products = x.double() @ before.codes.double().T  # [rows, outputs]
    wanted = layer(x).detach().double()
    for output in range(4):
        columns = torch.stack([products[:, output], torch.ones(64, dtype=torch.float64)], dim=1)
        factor, offset = torch.linalg.lstsq(columns, wanted[:, output]).solution
        torch.testing.assert_close(weight.params.scale[output].double(), factor, rtol=1e-6, atol=0)
        torch.testing.assert_close(weight.bias[output].double(), offset, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("layer", "shape", "axis", "group"),
    [
        (nn.Conv2d(4, 6, 3, groups=2, stride=2), (4, 9, 7), 1, None),
        (nn.Conv1d(12, 5, 2), (12, 8), 1, None),
        (nn.Linear(64, 5), (3, 64), 2, 16),
        (nn.Linear(64, 5, bias=False), (3, 64), 2, None),
    ],
    ids=["grouped convolution", "one axis", "groups of inputs", "no bias"],
)
def test_what_a_refit_leaves_is_orthogonal_to_every_output(
    layer: Any, shape: tuple[int, ...], axis: int, group: int | None
) -> None:
    layer, x = randomized(layer), torch.randn(32, *shape, generator=seeded(3)) + 0.5
    graph = capture(Small(lambda m, x: m.layer(x), layer=layer), (x[:2],))
    weight = IntegerType(3, signed=True)
    PlaceQuantizers(placement=replace(X86_VNNI, activation=None, weight=weight, weight_group=group)).run(graph)
    seen = list[Quantization]()

    def look(block: Block, found: Quantization) -> Quantization:
        seen.append(refit_affines(block, found))
        return found

    refine_blockwise(graph, [(x,), (x,)], round_all_to_nearest(graph, {}), {"look": look})
    (refitted,) = seen[0].weights.values()
    with torch.no_grad():
        wanted = layer.double()(x.double())
        layer.weight.data = refitted.values.double()
        if refitted.bias is not None:
            layer.bias.data = refitted.bias.double()
        given = layer(x.double())
    others = [other for other in range(wanted.ndim) if other != axis]
    rest, size = wanted - given, given.norm()
    if refitted.bias is not None:
        assert float(rest.sum(others).abs().max() / rest.abs().sum()) < 1e-6
        given = given - refitted.bias.double().reshape([-1 if other == axis else 1 for other in range(wanted.ndim)])
    assert float((rest * given).sum(others).abs().max() / (rest.norm() * size)) < 1e-6
    assert float(rest.norm() / wanted.norm()) > 0.05  # something is left, of three bits


def test_what_makes_it_worse_is_reverted() -> None:
    graph, start = decided("w4a8")

    def spoil(block: Any, found: Quantization) -> Quantization:
        weights = {name: replace(each, codes=-each.codes.clamp(min=-7)) for name, each in found.weights.items()}
        return Quantization(activations=found.activations, weights=weights)

    found, reports = refine_blockwise(graph, [(images(16, 1),), (images(16, 2),)], start, {"spoil": spoil})
    assert found is start
    assert all(not report.kept and set(report.reverted) == {"spoil"} for report in reports)


@pytest.mark.slow
def test_a_run_repeats() -> None:
    graph, start = decided("w3a4")
    chunks = chunked(((x[None],) for x in images(64, 1)), 16)
    first, second = (
        refine_blockwise(graph, chunks, start, refinements(Levers.of(Effort.LEARNED, Bits(3, 4)), seed=7))[0]
        for _ in range(2)
    )
    assert all(torch.equal(first.weights[name].codes, second.weights[name].codes) for name in first.weights)
    assert all(torch.equal(first.activations[name].scale, second.activations[name].scale) for name in first.activations)


def test_one_sample_teaches_and_judges() -> None:
    graph, start = decided("w4a8")
    found, _ = refine_blockwise(
        graph, [(images(1, 1),)], start, refinements(Levers.of(Effort.LEARNED, Bits(4, 8)), seed=0)
    )
    assert error(graph, found, images(16, 2)) <= 2 * error(graph, start, images(16, 2))


def test_eight_bits_are_refined_only_where_learning_is_asked_for() -> None:
    assert refinements(Levers.of(Effort.CLOSED_FORM, Bits(8, 8)), seed=0) == {}
    assert refinements(Levers.of(Effort.NEAREST, Bits(4, 8)), seed=0) == {}
    assert len(refinements(Levers.of(Effort.LEARNED, Bits(8, 8)), seed=0)) == 4


@pytest.mark.parametrize(
    ("word", "refinement", "field", "value"),
    [
        ("+asymmetric-correction", "error feedback", "asymmetric", True),
        ("-coordinate-descent", "error feedback", "descends", False),
        ("-drop", "reconstruction", "drop", 0.0),
        ("+soft-rounding", "reconstruction", "rounding", Rounding.SOFT),
    ],
)
def test_a_lever_reaches_what_it_is_a_part_of(word: str, refinement: str, field: str, value: object) -> None:
    levers = Levers.of(Effort.LEARNED, Bits(4, 4))
    before, after = (
        getattr(refinements(each, seed=0)[refinement].keywords["chosen"], field)  # type: ignore[attr-defined]
        for each in (levers, levers.changed(word))
    )
    assert after == value != before


@pytest.mark.parametrize("name", ["error-feedback", "bias-correction", "affine-refit", "reconstruction"])
def test_a_refinement_let_go_is_not_tried(name: str) -> None:
    levers = Levers.of(Effort.LEARNED, Bits(4, 4))
    tried = refinements(levers, seed=0).keys()
    assert tried - refinements(levers.changed(f"-{name}"), seed=0).keys() == {name.replace("-", " ")}
    assert refinements_at_once(levers.changed("-affine-tuning"), seed=0) == {}


@pytest.mark.parametrize("effort", [Effort.CLOSED_FORM, Effort.LEARNED])
def test_a_network_that_returns_integers_alone_is_refined_by_what_they_are_read_off(effort: Effort) -> None:
    parts = {"first": nn.Linear(12, 16), "last": nn.Linear(16, 5)}
    x = torch.randn(64, 12, generator=seeded(1))
    model = randomized(Small(lambda m, x: m.last(m.first(x).relu()).argmax(-1), **parts))
    graph = capture(model, (x[:2],))
    weight, activation = IntegerType(3, signed=True), IntegerType(8, signed=False)
    PlaceQuantizers(placement=replace(X86_VNNI, activation=activation, weight=weight)).run(graph)
    start = round_all_to_nearest(graph, observed_ranges(graph, x))
    levers = Levers.of(effort, Bits(3, 8)).changed("+curvature")
    _, reports = refine_blockwise(
        graph,
        chunked(((row[None],) for row in x), 16),
        start,
        refinements(levers, seed=0),
        at_once=refinements_at_once(levers, seed=0),
        foresight=1.0,
        curvature=True,
    )
    assert all(error > 0 for report in reports for error in (report.before, *report.kept.values()))
    assert any(report.kept for report in reports)


@pytest.mark.slow
def test_foresight_serves_the_output_where_the_blocks_own_error_does_not() -> None:
    graph, start = decided("w3a4")
    chunks = chunked(((x[None],) for x in images(128, 1)), 16)
    tried = refinements(Levers(reconstruction=True), seed=0)
    near, far = (refine_blockwise(graph, chunks, start, tried, foresight=weight)[0] for weight in (0.0, 1.0))
    assert error(graph, far, images(64, 2)) < 0.95 * error(graph, near, images(64, 2))


def test_the_loss_with_foresight_adds_the_error_of_the_networks_outputs() -> None:
    graph, start = decided("w3a8")
    chunks = [(images(16, 1),), (images(16, 2),)]
    losses = dict[tuple[str, float], float]()

    def watch(weight: float) -> Any:
        def watched(block: Block, found: Quantization) -> Quantization:
            name = block.segment.exits[-1].name
            losses[name, weight] = block.error(found, block.split.judging)
            wide = block.exact[1]  # behind a float network, a block of floats has no error in either sense
            floats = replace(block, entries=[wide, wide])
            assert floats.error(Quantization(activations={}, weights={}), floats.split.judging) < 1e-9
            return found

        return watched

    for weight in (0.0, 2.0):
        refine_blockwise(graph, chunks, start, {"watch": watch(weight)}, foresight=weight)
    names = {name for name, _ in losses}
    last = graph.outputs[0].name
    assert losses[last, 2.0] == losses[last, 0.0]
    assert all(losses[name, 2.0] > losses[name, 0.0] for name in names - {last})
