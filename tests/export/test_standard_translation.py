"""Builders get products of floats and codes of few bits in the words of the ONNX standard."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from float_files import outcome
from onnx import TensorProto, numpy_helper
from torch import Tensor, nn

from normfuse.export.onnx import export_onnx
from normfuse.export.placement import tensorrt_placement
from normfuse.graph import Graph, capture, query
from normfuse.kernels.ops import GROUPED_LINEAR, UNPACK
from normfuse.passes.insert_quantizers import InsertQuantizers
from normfuse.passes.place_quantizers import PlaceQuantizers
from normfuse.precision import round_all_to_nearest
from normfuse.quant.bits import Bits
from normfuse.quant.placement import Placement
from normfuse.testing import Small, observed_ranges, randomized, seeded

FOUR = tensorrt_placement(Bits.parse("w4a16"))


def sample(*shape: int) -> Tensor:
    return torch.randn(shape, generator=seeded(3))


def exported(model: nn.Module, x: Tensor, placement: Placement, path: Path) -> Graph:
    graph = capture(randomized(model), (x,))
    PlaceQuantizers(placement=placement).run(graph)
    decided = round_all_to_nearest(graph, observed_ranges(graph, x))
    assert decided.weights
    InsertQuantizers(activations=decided.activations, weights=decided.weights, biases_stay_float=True).run(graph)
    export_onnx(graph, path, standard=True)
    return graph


def standard(path: Path) -> onnx.ModelProto:
    """Return a file, which must have the operators of the standard alone."""
    model = onnx.load(path)
    assert {node.domain for node in model.graph.node} == {""}
    assert [each.domain for each in model.opset_import] == [""]
    assert not model.functions
    onnx.checker.check_model(model, full_check=True)
    return model


def the(model: onnx.ModelProto, operator: str) -> Any:
    (node,) = [node for node in model.graph.node if node.op_type == operator]
    return node


def attributes(node: onnx.NodeProto) -> dict[str, Any]:
    return {each.name: onnx.helper.get_attribute_value(each) for each in node.attribute}


def held(model: onnx.ModelProto, name: str) -> Any:
    (tensor,) = [each for each in model.graph.initializer if each.name == name]
    return tensor


def agrees(graph: Graph, path: Path, x: Tensor, terms: int) -> None:
    (expected,) = graph.run(x)
    (found,) = outcome(path, **{graph.input_names[0]: x.numpy()}).values()
    # Sums of so many float32 products, in any order, of numbers as large as the largest output at least.
    bound = 2 * terms * 2.0**-24 * max(1.0, float(expected.abs().max())) * 4
    assert np.abs(found - expected.numpy()).max() <= bound


@pytest.mark.parametrize(("shape", "bias"), [((3,), True), ((2, 5), False)], ids=["matrix", "three axes, no bias"])
@pytest.mark.parametrize(("inputs", "size", "outputs"), [(48, 16, 7), (96, 32, 13), (192, 64, 9), (256, 128, 21)])
def test_blocks_are_int4_in_the_file(
    inputs: int, size: int, outputs: int, bias: bool, shape: tuple[int, ...], tmp_path: Path
) -> None:
    x = sample(*shape, inputs)
    graph = exported(nn.Linear(inputs, outputs, bias=bias), x, FOUR, path := tmp_path / "m.onnx")
    model = standard(path)
    node = the(model, "DequantizeLinear")
    assert attributes(node) == {"axis": 1, "block_size": size} or attributes(node) == {"block_size": size}
    codes, scale = held(model, node.input[0]), held(model, node.input[1])
    assert (codes.data_type, list(codes.dims)) == (TensorProto.INT4, [outputs, inputs])
    assert list(scale.dims) == [outputs, inputs // size]
    (product,) = [each for each in graph.nodes if query.is_call(each, GROUPED_LINEAR)]
    wanted = query.constant(graph, product.args[1]).numpy()  # type: ignore[arg-type]
    raw = np.frombuffer(codes.raw_data, np.uint8)
    assert len(raw) == (outputs * inputs + 1) // 2
    nibbles = np.stack([raw & 15, raw >> 4], axis=1).flatten()[: outputs * inputs]
    signed = np.where(nibbles > 7, nibbles.astype(int) - 16, nibbles)
    np.testing.assert_array_equal(signed.reshape(outputs, inputs), wanted)
    assert set(np.unique(wanted)) == set(range(-8, 8)) or inputs < 200
    operators = {each.op_type for each in model.graph.node}
    assert operators <= {"DequantizeLinear", "Transpose", "MatMul", "Add"}
    assert ("Add" in operators) == bias
    agrees(graph, path, x, inputs)


def test_a_width_that_blocks_do_not_divide_has_a_scale_per_channel(tmp_path: Path) -> None:
    x = sample(3, 5, 37)
    graph = exported(nn.Linear(37, 11), x, FOUR, path := tmp_path / "m.onnx")
    assert [each for each in graph.nodes if query.is_call(each, UNPACK)]
    model = standard(path)
    node = the(model, "DequantizeLinear")
    assert "block_size" not in attributes(node)
    assert attributes(node).get("axis", 1) == 0
    codes, scale = held(model, node.input[0]), held(model, node.input[1])
    assert (codes.data_type, list(codes.dims), list(scale.dims)) == (TensorProto.INT8, [11, 37], [11])
    agrees(graph, path, x, 37)


def test_a_convolution_of_eight_bits_behind_floats_has_a_scale_per_channel(tmp_path: Path) -> None:
    x = sample(2, 3, 7, 5)
    placement = tensorrt_placement(Bits.parse("w8a16"))
    model = Small(lambda m, x: m.a(x), a=nn.Conv2d(3, 11, (3, 2)))
    graph = exported(model, x, placement, path := tmp_path / "m.onnx")
    node = the(standard(path), "DequantizeLinear")
    assert attributes(node)["axis"] == 0
    agrees(graph, path, x, 18)


def test_maps_of_blocks_and_of_none_stand_in_one_file(tmp_path: Path) -> None:
    x = sample(2, 5, 64)
    parts = {"a": nn.Linear(64, 48), "b": nn.Linear(48, 33), "c": nn.Linear(33, 6)}
    model = Small(lambda m, x: m.c(m.b(m.a(x).tanh()).tanh()), **parts)
    placement = replace(FOUR, weight_group=32)
    graph = exported(model, x, placement, path := tmp_path / "m.onnx")
    written = standard(path)
    found = [attributes(each).get("block_size", 0) for each in written.graph.node if each.op_type == "DequantizeLinear"]
    assert found == [32, 16, 0]
    read = [each.input[0] for each in written.graph.node if each.op_type == "DequantizeLinear"]
    kinds = [held(written, name).data_type for name in read]
    assert kinds == [TensorProto.INT4, TensorProto.INT4, TensorProto.INT8]
    agrees(graph, path, x, 64)


def test_one_weight_that_two_products_read(tmp_path: Path) -> None:
    x = sample(3, 64)
    model = Small(lambda m, x: m.a(x) + m.a(x.tanh()), a=nn.Linear(64, 9))
    graph = exported(model, x, FOUR, path := tmp_path / "m.onnx")
    written = standard(path)
    codes = [each for each in written.graph.initializer if list(each.dims) == [9, 64]]
    assert codes
    assert {each.data_type for each in codes} == {TensorProto.INT4}
    agrees(graph, path, x, 64)


def test_scales_are_as_they_were(tmp_path: Path) -> None:
    x = sample(3, 48)
    graph = exported(nn.Linear(48, 5), x, FOUR, path := tmp_path / "m.onnx")
    (product,) = [each for each in graph.nodes if query.is_call(each, GROUPED_LINEAR)]
    model = standard(path)
    scale = numpy_helper.to_array(held(model, the(model, "DequantizeLinear").input[1]))
    np.testing.assert_array_equal(scale, query.constant(graph, product.args[2]).numpy())  # type: ignore[arg-type]
