"""Quantizers stand in the place of requests, and the graph computes what scales and codes say."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim, export

from normfuse.export.placement import X86_VNNI, tensorrt_placement
from normfuse.graph import Graph, capture, ops, query, verify
from normfuse.graph.quantization import requests
from normfuse.kernels.ops import DEQUANTIZE, GROUPED_LINEAR, QUANTIZE, QUANTIZE_FLOAT8, UNPACK
from normfuse.passes.canonicalize import Canonicalize
from normfuse.passes.insert_quantizers import InsertQuantizers
from normfuse.passes.place_quantizers import PlaceQuantizers
from normfuse.precision import round_all_to_nearest
from normfuse.quant import IntegerType, QuantParams, Range, WeightClip, asymmetric, quantize_dequantize, weight_params
from normfuse.quant.bits import Bits
from normfuse.quant.float_type import FLOAT8
from normfuse.quant.target import EightBits
from normfuse.report import Reason
from normfuse.testing import (
    Golden,
    Small,
    check_pass_contract,
    distance,
    fold_tolerance,
    observed_ranges,
    picture,
    randomized,
    seeded,
)


def sample(*shape: int) -> Tensor:
    return torch.randn(shape, generator=seeded(9))


def placed(model: Any, x: Tensor) -> tuple[Graph, InsertQuantizers]:
    """Return a graph with requests, and the pass with the ranges of ``x``."""
    graph = capture(model, (x,))
    Canonicalize().run(graph)
    PlaceQuantizers(placement=X86_VNNI).run(graph)
    return graph, decided(graph, observed_ranges(graph, x))


def decided(graph: Graph, ranges: dict[str, Range]) -> InsertQuantizers:
    found = round_all_to_nearest(graph, ranges)
    return InsertQuantizers(activations=found.activations, weights=found.weights)


def params_of(x: Tensor) -> QuantParams:
    """Return scale and zero point of ``x`` from its own range (1)."""
    return asymmetric(float(x.min()), float(x.max()), X86_VNNI.activation)


def test_picture(golden: Golden) -> None:
    parts = {"a": nn.Linear(9, 12, bias=False), "b": nn.Linear(12, 8), "c": nn.Conv1d(5, 4, 3)}
    x = sample(3, 5, 9)
    graph, step = placed(randomized(Small(lambda m, x: m.c(m.b(F.gelu(m.a(x)))), **parts)), x)
    before = graph.text()
    report = step.run(graph)
    assert report.applied == {"activation": 3, "weight": 3}
    assert picture(before, graph.text()) == golden


LAYERS = [
    pytest.param(nn.Linear(9, 4), (3, 9), F.linear, id="linear on a matrix"),
    pytest.param(nn.Linear(9, 4), (3, 5, 9), F.linear, id="linear on three axes"),
    pytest.param(nn.Linear(9, 4), (3, 2, 5, 9), F.linear, id="linear on four axes"),
    pytest.param(nn.Linear(9, 4, bias=False), (3, 5, 9), F.linear, id="linear without a bias"),
    pytest.param(nn.Conv1d(5, 4, 3), (3, 5, 9), F.conv1d, id="conv1d"),
    pytest.param(nn.Conv2d(3, 5, (3, 4), bias=False), (3, 3, 5, 9), F.conv2d, id="conv2d without a bias"),
]


@pytest.mark.parametrize(("layer", "shape", "function"), LAYERS)
def test_numbers_and_contract(layer: Any, shape: tuple[int, ...], function: Any) -> None:
    x = sample(*shape)
    model = randomized(Small(lambda m, x: m.layer(x), layer=layer))
    graph, step = placed(model, x)
    assert check_pass_contract(step, graph, (x,)).changed
    tolerance = fold_tolerance(graph, x)
    step.run(graph)
    weight, bias = layer.weight.detach(), None if layer.bias is None else layer.bias.detach()
    codes = weight_params(weight, 0, X86_VNNI.weight, clip=WeightClip.MSE)
    expected = function(quantize_dequantize(x, params_of(x)), quantize_dequantize(weight, codes), bias)
    half_a_step_of_the_bias = float(params_of(x).scale * codes.scale.max()) / 2
    assert float((graph.run(x)[0] - expected).abs().max()) <= tolerance + half_a_step_of_the_bias
    assert distance(graph.run(x), [model(x)]) < 0.05, "8 bits"
    assert not any(query.is_call(node, ops.LINEAR) for node in graph.nodes), "linear maps are written on rows"


def test_two_dynamic_axes() -> None:
    model = randomized(Small(lambda m, x: m.b(m.a(x).relu()), a=nn.Linear(9, 12), b=nn.Linear(12, 8)))
    sizes = {"x": {0: Dim("batch"), 1: Dim("tokens")}}
    graph = capture(export(model, (sample(3, 5, 9),), dynamic_shapes=sizes))
    PlaceQuantizers(placement=X86_VNNI).run(graph)
    step = decided(graph, observed_ranges(graph, sample(3, 5, 9)))
    check_pass_contract(step, graph, (sample(3, 5, 9),))
    assert step.run(graph).applied == {"activation": 2, "weight": 2}
    verify(graph)
    assert graph.output_specs[0].shape == (None, None, 8)
    for shape in [(3, 5, 9), (1, 1, 9), (2, 7, 9)]:
        x = sample(*shape).clamp(-1, 1)
        assert distance(graph.run(x), [model(x)]) < 0.05


def test_one_dynamic_axis_is_not_computed() -> None:
    graph, step = placed(Small(lambda m, x: m.a(x), a=nn.Linear(9, 12)), sample(3, 5, 9))
    step.run(graph)
    assert not any(query.is_call(node, ops.ATEN.sym_size.int) for node in graph.nodes)


def test_a_tensor_without_a_range_stays_float() -> None:
    x = sample(3, 9)
    model = randomized(Small(lambda m, x: m.b(F.gelu(m.a(x))), a=nn.Linear(9, 12), b=nn.Linear(12, 8)))
    graph, _ = placed(model, x)
    nothing = decided(graph, {})
    report = check_pass_contract(nothing, graph, (x,))
    assert [(refusal.node, refusal.reason) for refusal in report.refused] == [
        ("x", Reason.NO_RANGE),
        ("gelu", Reason.NO_RANGE),
    ]
    nothing.run(graph)
    assert not requests(graph)
    assert torch.equal(graph.run(x)[0], model(x))


def test_what_was_refused_stays_float_though_codes_are_read_beside_it() -> None:
    parts = {"a": nn.Conv2d(3, 16, 3), "small": nn.Conv2d(16, 16, (1, 3), groups=16)}
    x = sample(2, 3, 6, 7)
    graph, step = placed(randomized(Small(lambda m, x: m.small(m.a(x).relu()), **parts)), x)
    assert step.run(graph).applied == {"activation": 1, "weight": 1}
    _, small = (node for node in graph.nodes if query.is_call(node, ops.CONV2D))
    assert query.is_constant(small.args[1])
    assert not query.is_call(small.args[0], DEQUANTIZE)


def test_who_did_not_ask_reads_floats() -> None:
    graph, step = placed(Small(lambda m, x: m.a(x) + x, a=nn.Linear(9, 9)), sample(3, 9))
    step.run(graph)
    (image,) = graph.inputs
    assert {reader.target for reader in query.readers(image)} == {QUANTIZE, ops.ADD}


def test_one_bias_for_all_outputs() -> None:
    x = sample(4, 9)
    model = Small(lambda m, x: torch.addmm(m.bias, x, m.weight), bias=sample(1), weight=sample(9, 5))
    graph, step = placed(model, x)
    assert step.run(graph).applied == {"activation": 1, "weight": 1}
    assert distance(graph.run(x), [model(x)]) < 0.05


def test_one_weight_with_two_readers() -> None:
    x = sample(4, 9)
    model = Small(lambda m, x: m.a(x) + m.a(x.tanh()), a=nn.Linear(9, 5))
    graph, step = placed(model, x)
    assert step.run(graph).applied == {"activation": 2, "weight": 2}
    assert distance(graph.run(x), [model(x)]) < 0.05


def test_float_activations_meet_the_values_of_codes() -> None:
    x = sample(4, 3, 6, 7)
    parts = {"a": nn.Conv2d(3, 16, 3), "b": nn.Linear(5, 8, bias=False)}
    model = randomized(Small(lambda m, x: m.b(m.a(x).relu()), **parts))
    graph = capture(model, (x,))
    placement = replace(X86_VNNI, activation=None, weight=IntegerType(4, signed=True))
    PlaceQuantizers(placement=placement).run(graph)
    assert not requests(graph)
    step = decided(graph, {})
    check_pass_contract(step, graph, (x,))
    assert step.run(graph).applied == {"weight": 1}  # b reads 5 inputs only
    (codes,) = (query.constant(graph, node.args[0]) for node in graph.nodes if query.is_call(node, UNPACK))  # type: ignore[arg-type]
    assert codes.unique().numel() > 8
    assert int(codes.min()) >= -8
    assert int(codes.max()) <= 7
    with torch.no_grad():
        model.a.weight.copy_(step.weights["conv2d"].values)
    assert distance(graph.run(x), [model(x)]) < 1e-6


def test_a_scale_per_group_behind_float_activations() -> None:
    x = sample(4, 3, 96)
    parts = {"a": nn.Linear(96, 40), "b": nn.Linear(40, 24, bias=False), "c": nn.Linear(24, 9)}
    model = randomized(Small(lambda m, x: m.c(m.b(m.a(x).tanh()).tanh()), **parts))
    with torch.no_grad():
        model.a.weight[:, 32:64] *= 50  # a group that a scale per channel would be ruled by
    graph = capture(model, (x,))
    weight = IntegerType(4, signed=True)
    PlaceQuantizers(placement=replace(X86_VNNI, activation=None, weight=weight, weight_group=128)).run(graph)
    step = decided(graph, {})
    check_pass_contract(step, graph, (x,))
    grouped = graph.copy()
    step.run(grouped)
    sizes = [node.args[5] for node in grouped.nodes if query.is_call(node, GROUPED_LINEAR)]
    assert sizes == [32], "40 and 24 inputs have no group of 16 or more"
    scales = step.weights["linear"].params.scale
    assert scales.shape == (40, 3)
    assert (scales[:, 1] > 20 * scales[:, 0]).all()
    with torch.no_grad():
        for name, node in zip("abc", ("linear", "linear_1", "linear_2"), strict=True):
            getattr(model, name).weight.copy_(step.weights[node].values)
    assert distance(grouped.run(x), [model(x)]) < 1e-6


@pytest.mark.parametrize("eight", list(EightBits))
@pytest.mark.parametrize("shape", [(4, 9), (3, 5, 9)])
def test_on_tensorrt_codes_are_symmetric_and_biases_are_added_as_floats(
    shape: tuple[int, ...], eight: EightBits
) -> None:
    x = sample(*shape)
    layer = nn.Linear(9, 4)
    model = randomized(Small(lambda m, x: m.layer(x), layer=layer))
    graph = capture(model, (x,))
    PlaceQuantizers(placement=tensorrt_placement(Bits(8, 8), eight)).run(graph)
    found = round_all_to_nearest(graph, observed_ranges(graph, x))
    step = InsertQuantizers(activations=found.activations, weights=found.weights, biases_stay_float=True)
    assert check_pass_contract(step, graph, (x,)).applied == {"activation": 1, "weight": 1}
    tolerance = fold_tolerance(graph, x)
    step.run(graph)
    verify(graph)
    (product,) = (node for node in graph.nodes if query.is_call(node, ops.LINEAR))
    assert all(query.is_call(node, DEQUANTIZE) for node in product.args[:2])
    assert query.constant(graph, product.args[2]).dtype is torch.float32  # type: ignore[arg-type]
    operator = QUANTIZE_FLOAT8 if eight is EightBits.FP8 else QUANTIZE
    (quantizer,) = (node for node in graph.nodes if query.is_call(node, operator))
    kind = FLOAT8.torch_dtype if eight is EightBits.FP8 else torch.int8
    held = [query.constant(graph, node) for node in (quantizer.args[2], product.args[1].args[0])]  # type: ignore[arg-type, union-attr]
    assert [each.dtype for each in held] == [kind, kind]
    assert not held[0].float().any(), "zero stands at 0"
    (params,) = found.activations.values()
    assert isinstance(params, QuantParams)
    (weight,) = found.weights.values()
    expected = F.linear(quantize_dequantize(x, params), weight.values, layer.bias.detach())
    assert float((graph.run(x)[0] - expected).abs().max()) <= tolerance
    assert distance(graph.run(x), [model(x)]) < (0.1 if eight is EightBits.FP8 else 0.05), "8 bits"
