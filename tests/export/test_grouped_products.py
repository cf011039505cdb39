"""Products of packed codes in onnxruntime: codes of rows made on the fly, zero points of groups, one by one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from normfuse.export.onnx import export_onnx
from normfuse.export.placement import onnx_placement
from normfuse.graph import Graph, capture, query
from normfuse.kernels.ops import GROUPED_LINEAR
from normfuse.passes.insert_quantizers import InsertQuantizers
from normfuse.passes.place_quantizers import PlaceQuantizers
from normfuse.precision import Quantization, round_all_to_nearest
from normfuse.quant import DynamicParams, IntegerType, PerGroup, QuantParams, RoundedWeight
from normfuse.quant.bits import Bits
from normfuse.quant.code_kinds import ActivationCodes, WeightCodes
from normfuse.runtime.agreement import compare_codes, output_error
from normfuse.runtime.onnx_session import open_onnx
from normfuse.testing import Small, observed_ranges, randomized, seeded

DYNAMIC, STATIC = ActivationCodes.DYNAMIC, ActivationCodes.STATIC
ASYMMETRIC, SYMMETRIC = WeightCodes.ASYMMETRIC, WeightCodes.SYMMETRIC
FLOAT32 = 1e-5
"""Sums of a few hundred products in float32, zero points added apart: eps (6e-8) times their number at most."""


def placed(module: nn.Module, x: Tensor, bits: str, activations: ActivationCodes, weights: WeightCodes) -> Graph:
    graph = capture(module, (x,))
    placement = onnx_placement("avx512_vnni", Bits.parse(bits), activations=activations, weights=weights)
    PlaceQuantizers(placement=placement).run(graph)
    return graph


def written(graph: Graph, decided: Quantization, path: Path) -> onnx.ModelProto:
    InsertQuantizers(activations=decided.activations, weights=decided.weights).run(graph)
    export_onnx(graph, path)
    return onnx.load(path)


def run(path: Path, graph: Graph, x: Tensor) -> Tensor:
    (found,) = open_onnx(path, threads=1).run({graph.input_names[0]: x.numpy()}).values()
    return torch.from_numpy(found)


@pytest.mark.parametrize("size", [16, 32, 128])
@pytest.mark.parametrize("bits", ["w4a8", "8"])
def test_the_engine_makes_the_simulations_codes(bits: str, size: int, tmp_path: Path) -> None:
    """A weight of ones on the diagonal lets every code through; the inputs stand on the borders between codes."""
    inputs, kind = 2 * size, IntegerType(4 if bits == "w4a8" else 8, signed=True)
    on = PerGroup(1, size)
    params = QuantParams(
        scale=torch.ones(inputs, 2), zero_point=torch.zeros(inputs, 2, dtype=torch.int32), type=kind, granularity=on
    )
    weight = RoundedWeight(codes=torch.eye(inputs, dtype=torch.int8), params=params, bias=None)
    largest = torch.rand(65, 1, generator=seeded(size)) * 10 + 0.1
    x = torch.randint(-127, 127, (65, inputs), generator=seeded(1)).add(0.5) * (largest / 127)
    x[:, 0], x[:, size] = largest[:, 0], -largest[:, 0]

    graph = placed(nn.Linear(inputs, inputs, bias=False), x, bits, DYNAMIC, SYMMETRIC)
    if size < 128:  # of as many inputs the placement makes one group
        for node in [node for node in graph.nodes if node.op == "call_function" and len(node.args) == 5]:
            node.args = (*node.args[:4], size)
    (source,) = round_all_to_nearest(graph, {}).activations
    (name,) = round_all_to_nearest(graph, {}).weights
    decided = Quantization(activations={source: DynamicParams(size=size)}, weights={name: weight})
    written(graph, decided, path := tmp_path / "model.onnx")
    step = largest / 127
    for rows in (1, 2, 3, 4, 7, 65):
        engine = (run(path, graph, x[:rows]) / step[:rows]).round()
        simulated = (graph.run(x[:rows])[0] / step[:rows]).round()
        assert torch.equal(engine, simulated), f"{rows} rows"
        assert engine.abs().max() == 127


@pytest.mark.parametrize(
    ("inputs", "size", "bias"), [(128, 128, True), (96, 32, False), (48, 16, True), (384, 128, False), (80, 16, True)]
)
@pytest.mark.parametrize(
    ("bits", "activations", "weights"),
    [
        ("w4a16", STATIC, ASYMMETRIC),
        ("w3a16", STATIC, ASYMMETRIC),
        ("w2a16", STATIC, ASYMMETRIC),
        ("w4a8", DYNAMIC, SYMMETRIC),
        ("w4a8", DYNAMIC, ASYMMETRIC),
        ("w2a8", DYNAMIC, ASYMMETRIC),
        ("w6a8", DYNAMIC, SYMMETRIC),
        ("8", DYNAMIC, SYMMETRIC),
        ("8", DYNAMIC, ASYMMETRIC),
    ],
)
def test_the_file_holds_the_codes_and_computes_the_simulation(  # noqa: PLR0917 - a table
    bits: str,
    activations: ActivationCodes,
    weights: WeightCodes,
    inputs: int,
    size: int,
    bias: bool,
    tmp_path: Path,
) -> None:
    x = torch.randn(3, 5, inputs, generator=seeded(3))
    module = randomized(nn.Linear(inputs, 21, bias=bias))
    with torch.no_grad():
        module.weight.add_(module.weight.std())  # so that zero points are not 0
    graph = placed(module, x, bits, activations, weights)
    decided = round_all_to_nearest(graph, {})
    (weight,) = decided.weights.values()
    model = written(graph, decided, path := tmp_path / "model.onnx")

    (node,) = [node for node in model.graph.node if node.op_type == "MatMulNBits"]
    attributes = {each.name: each.i for each in node.attribute}
    wide = Bits.parse(bits).weight > 4
    assert attributes["bits"] == (8 if wide else 4)
    assert (attributes["K"], attributes["N"], attributes["block_size"]) == (inputs, 21, size)
    assert attributes["accuracy_level"] == (4 if activations is DYNAMIC else 0)
    held = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    middle = 128 if wide else 8
    assert held[node.input[1]].shape == (21, inputs // size, size * (8 if wide else 4) // 8)
    np.testing.assert_array_equal(nibbles(held[node.input[1]], wide).reshape(21, inputs) - middle, weight.codes)
    zero_points = node.input[3] if len(node.input) > 3 else ""
    assert bool(zero_points) is (weights is ASYMMETRIC)
    if zero_points:
        zeros = nibbles(held[zero_points], wide)[:, : inputs // size] - middle
        np.testing.assert_array_equal(zeros, weight.params.zero_point)
        assert zeros.any()
    assert not [name for name, tensor in held.items() if tensor.dtype == np.int8], "nothing is held twice"

    found = compare_codes(graph, path, [(x,), (100 * x,)], threads=1)
    assert len(found.products) == (activations is DYNAMIC)
    assert found.largest_product_error < FLOAT32
    assert output_error(run(path, graph, x).numpy(), graph.run(x)[0].numpy()) < FLOAT32
    floats = output_error(
        run(path, graph, x).numpy(), torch.nn.functional.linear(x, weight.values, module.bias).detach()
    )
    assert (floats > 1e-4) is (activations is DYNAMIC), "codes of rows show"


def nibbles(packed: np.ndarray, wide: bool) -> np.ndarray:
    """Return the values of packed bytes, [rows, ...], by rows."""
    rows = packed.reshape(len(packed), -1).astype(np.int32)
    return rows if wide else np.stack([rows & 15, rows >> 4], axis=2).reshape(len(rows), -1)


@pytest.mark.parametrize("kind", ["zeros", "a constant group", "a dead output", "all positive", "tiny"])
@pytest.mark.parametrize("activations", [STATIC, DYNAMIC])
def test_degenerate_weights_and_rows(kind: str, activations: ActivationCodes, tmp_path: Path) -> None:
    module, x = randomized(nn.Linear(64, 17)), torch.randn(5, 64, generator=seeded(4))
    x[0], x[1, :32] = 0, 1e-41
    with torch.no_grad():
        match kind:
            case "zeros":
                module.weight.zero_()
            case "a constant group":
                module.weight[:, :32] = 0.731
            case "a dead output":
                module.weight[3] = 0
            case "all positive":
                module.weight.abs_()
            case _:
                module.weight.mul_(1e-30)
    bits = "w4a8" if activations is DYNAMIC else "w4a16"
    graph = placed(module, x, bits, activations, ASYMMETRIC)
    decided = round_all_to_nearest(graph, {})
    written(graph, decided, path := tmp_path / "model.onnx")
    found, simulated = run(path, graph, x), graph.run(x)[0]
    assert bool(found.isfinite().all())
    assert output_error(found.numpy(), simulated.numpy()) < FLOAT32
    assert torch.equal(simulated[0], module.bias), "a row of zeros adds nothing"
    (weight,) = decided.weights.values()
    if kind in {"zeros", "a dead output"}:
        dead = module.weight.abs().sum(1) == 0
        assert torch.equal(weight.values[dead], module.weight[dead])


@pytest.mark.parametrize("bits", ["w4a8", "w3a8", "8"])
def test_integer_kernels_take_zero_points_of_channels(bits: str, tmp_path: Path) -> None:
    """Through static codes: a convolution and a linear map whose weights are not centred."""
    parts = {"a": nn.Conv2d(3, 12, 3), "b": nn.Linear(24, 16)}
    model = randomized(Small(lambda m, x: m.b(m.a(x).relu().reshape(-1, 8, 24)), **parts))
    with torch.no_grad():
        for part in parts.values():
            part.weight.add_(part.weight.std())
    x = torch.randn(4, 3, 6, 6, generator=seeded(3))
    graph = placed(model, x, bits, STATIC, ASYMMETRIC)
    decided = round_all_to_nearest(graph, observed_ranges(graph, x))
    assert all(bool(weight.params.zero_point.any()) for weight in decided.weights.values())
    written(graph, decided, path := tmp_path / "model.onnx")
    found = compare_codes(graph, path, [(x,)], threads=1)
    assert not found.missing
    assert found.largest_difference <= 1
    assert max(tensor.share_different for tensor in found.tensors) < 0.01
    assert found.output_error < FLOAT32


def test_convolutions_stay_float_products_of_codes_where_activations_are_dynamic(tmp_path: Path) -> None:
    parts = {"a": nn.Conv2d(3, 12, 3), "b": nn.Linear(24, 16), "c": nn.Linear(16, 20)}
    model = randomized(Small(lambda m, x: m.c(m.b(m.a(x).relu().reshape(-1, 8, 24))), **parts))
    x = torch.randn(4, 3, 6, 6, generator=seeded(3))
    graph = placed(model, x, "w4a8", DYNAMIC, ASYMMETRIC)
    decided = round_all_to_nearest(graph, {})
    assert len(decided.weights) == 3
    assert list(decided.activations.values()) == [DynamicParams(size=16)], "24 inputs have no group"
    assert decided.kinds == {
        "static activations": 0,
        "dynamic activations": 1,
        "symmetric weights": 2,
        "asymmetric weights": 1,
    }
    model_proto = written(graph, decided, path := tmp_path / "model.onnx")
    operators = [node.op_type for node in model_proto.graph.node]
    assert operators.count("MatMulNBits") == 1
    assert "QuantizeLinear" not in operators
    assert len([node for node in graph.nodes if query.is_call(node, GROUPED_LINEAR)]) == 1
    found = compare_codes(graph, path, [(x,)], threads=1)
    assert [product.error < FLOAT32 for product in found.products] == [True]
    assert found.output_error < FLOAT32


def test_products_in_a_chain_are_each_compared(tmp_path: Path) -> None:
    """The second reads what the first writes: a wrong first one must not hide behind the engine's value."""
    parts = {"a": nn.Linear(32, 48), "b": nn.Linear(48, 16)}
    model, x = randomized(Small(lambda m, x: m.b(m.a(x)), **parts)), torch.randn(6, 32, generator=seeded(2))
    graph = placed(model, x, "w4a8", DYNAMIC, SYMMETRIC)
    decided = round_all_to_nearest(graph, {})
    written(graph, decided, path := tmp_path / "model.onnx")
    found = compare_codes(graph, path, [(x,)], threads=1)
    assert [product.error < FLOAT32 for product in found.products] == [True, True]
    broken = graph.copy()
    first = next(node for node in broken.nodes if query.is_call(node, GROUPED_LINEAR))
    query.constant(broken, first.args[1])[0, 0] += 1
    wrong = compare_codes(broken, path, [(x,)], threads=1)
    assert [product.error < FLOAT32 for product in wrong.products] == [False, True]
    assert wrong.output_error < FLOAT32, "behind it the engine's output goes on"
