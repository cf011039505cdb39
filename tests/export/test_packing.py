"""Small codes take four bits in the file, and onnxruntime computes what it computed before."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from normfuse.export.onnx import export_onnx
from normfuse.export.packing import FEWEST, is_packed
from normfuse.export.placement import onnx_placement
from normfuse.graph import capture
from normfuse.passes.insert_quantizers import InsertQuantizers
from normfuse.passes.place_quantizers import PlaceQuantizers
from normfuse.passes.quantize_tables import QuantizeTables
from normfuse.precision import round_all_to_nearest
from normfuse.quant import IntegerType, Range
from normfuse.quant.bits import Bits
from normfuse.runtime.agreement import compare_codes, output_error
from normfuse.runtime.onnx_session import open_onnx
from normfuse.testing import Small, randomized, seeded

PARTS = {"a": nn.Conv2d(3, 12, 3, bias=False), "b": nn.Linear(24, 16)}


@pytest.mark.parametrize("bits", ["8", "w4a8", "w3a8", "w2a8", "w5a8", "w4a4", "w6a3", "w4a16", "w3a16", "w8a16"])
def test_the_file_computes_what_the_simulation_does(bits: str, tmp_path: Path) -> None:
    x = torch.randn(4, 3, 6, 6, generator=seeded(3))
    model = randomized(Small(lambda m, x: m.b(m.a(x).relu().reshape(-1, 8, 24)), **PARTS))
    graph, precision = capture(model, (x,)), Bits.parse(bits)
    PlaceQuantizers(placement=onnx_placement("avx512_vnni", precision)).run(graph)
    ranges = {name: Range(-3.0, 3.0) for name in ("x", "relu", "reshape", "view")}
    decided = round_all_to_nearest(graph, ranges)
    assert len(decided.weights) == 2
    InsertQuantizers(activations=decided.activations, weights=decided.weights).run(graph)
    export_onnx(graph, path := tmp_path / "model.onnx")
    found = compare_codes(graph, path, [(x,)], threads=1)
    assert not found.missing
    assert found.largest_difference <= 1
    assert found.output_error < 1e-3
    (expected,) = graph.run(x)
    (engine,) = open_onnx(path, threads=1).run({"x": x.numpy()}).values()
    assert output_error(engine, expected.numpy()) < 0.1, "one code may differ"
    written = onnx.load(path)
    kinds = {tensor.name: tensor.data_type for tensor in written.graph.initializer}
    packed = [name for name, kind in kinds.items() if kind == onnx.TensorProto.INT4]
    assert len(packed) == (2 if precision.weight <= 4 else 0)


@pytest.mark.parametrize(
    ("inputs", "size", "bias"), [(128, 128, True), (96, 32, False), (48, 16, True), (384, 128, False)]
)
@pytest.mark.parametrize("bits", ["w4a16", "w3a16", "w2a16"])
def test_groups_are_onnxruntimes_packed_product(bits: str, inputs: int, size: int, bias: bool, tmp_path: Path) -> None:
    x = torch.randn(3, 5, inputs, generator=seeded(3))
    graph = capture(randomized(nn.Linear(inputs, 21, bias=bias)), (x,))
    PlaceQuantizers(placement=onnx_placement("avx512_vnni", Bits.parse(bits))).run(graph)
    decided = round_all_to_nearest(graph, {})
    InsertQuantizers(activations={}, weights=decided.weights).run(graph)
    export_onnx(graph, path := tmp_path / "model.onnx")
    (node,) = [node for node in onnx.load(path).graph.node if node.op_type == "MatMulNBits"]
    held = {tensor.name: tensor for tensor in onnx.load(path).graph.initializer}
    assert list(held[node.input[1]].dims) == [21, inputs // size, size // 2]
    assert len(held[node.input[1]].raw_data) == 21 * inputs // 2
    assert not [tensor for tensor in held.values() if tensor.data_type == onnx.TensorProto.INT8]
    (expected,) = graph.run(x)
    (engine,) = open_onnx(path, threads=1).run({graph.input_names[0]: x.numpy()}).values()
    assert output_error(engine, expected.numpy()) < 1e-5


class Towers(nn.Module):
    """A map and a table that are read twice, beside a map of equal weights."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.words, self.first, self.second = nn.Embedding(80, width), nn.Linear(width, 16), nn.Linear(16, 16)
        with torch.no_grad():
            self.second.weight.copy_(self.first.weight[:, :16])

    def forward(self, ids: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
        left, right = self.first(self.words(ids)), self.first(self.words(others))
        return left * right + self.second(left)


@pytest.mark.parametrize("width", [16, 128])
def test_what_is_read_twice_is_packed_once(width: int, tmp_path: Path) -> None:
    """The exporter joins equal constants of up to 1,024 elements: at a width of 16 all codes of the maps."""
    ids, others = torch.arange(6)[None] + 3, torch.arange(6)[None] + 40
    graph = capture(Towers(width), (ids, others))
    QuantizeTables(type=IntegerType(4, signed=True)).run(graph)
    PlaceQuantizers(placement=onnx_placement("avx512_vnni", Bits.parse("w4a16"))).run(graph)
    decided = round_all_to_nearest(graph, {})
    InsertQuantizers(activations={}, weights=decided.weights).run(graph)
    export_onnx(graph, path := tmp_path / "model.onnx")
    nodes = onnx.load(path).graph.node
    for kind, readers in (("MatMulNBits", 3), ("GatherBlockQuantized", 2)):
        assert len([node for node in nodes if node.op_type == kind]) == readers
    codes = {node.input[1] for node in nodes if node.op_type == "MatMulNBits"}
    tables = {node.input[0] for node in nodes if node.op_type == "GatherBlockQuantized"}
    assert len(tables) == 1
    assert len(codes) == (1 if width == 16 else 3)
    names = graph.input_names
    (engine,) = open_onnx(path, threads=1).run({names[0]: ids.numpy(), names[1]: others.numpy()}).values()
    assert output_error(engine, graph.run(ids, others)[0].numpy()) < 1e-5


def test_two_codes_share_a_byte(tmp_path: Path) -> None:
    sizes = {}
    for bits in ("8", "4"):
        graph = capture(randomized(nn.Linear(256, 512, bias=False)), (torch.randn(2, 256),))
        PlaceQuantizers(placement=onnx_placement("avx512_vnni", Bits.parse(bits))).run(graph)
        decided = round_all_to_nearest(graph, {"input": Range(-3.0, 3.0), "input_1": Range(-3.0, 3.0)})
        InsertQuantizers(activations=decided.activations, weights=decided.weights).run(graph)
        export_onnx(graph, path := tmp_path / f"{bits}.onnx")
        sizes[bits] = path.stat().st_size
    assert sizes["8"] - sizes["4"] == pytest.approx(256 * 512 / 2, rel=0.02)


@pytest.mark.parametrize(
    ("codes", "is_small"),
    [
        (np.array([-8, 7]), True),
        (np.array([-9, 7]), False),
        (np.array([0, 8]), False),
        (np.array([0, 1]), True),
    ],
)
def test_what_fits_four_bits_is_packed(codes: np.ndarray, is_small: bool) -> None:
    wide = torch.from_numpy(np.resize(codes, (2, FEWEST // 2)).astype(np.int8))
    assert is_packed(wide) is is_small
    assert not is_packed(wide[:, 1:])
    assert not is_packed(wide.flatten()), "zero points of rows are no codes"
    assert not is_packed(wide.int())
