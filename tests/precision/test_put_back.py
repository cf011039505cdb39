"""Single blocks get more bits or floats; the others stay what they are."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from normfuse.export.placement import X86_VNNI, onnx_placement
from normfuse.graph import Graph, capture
from normfuse.graph.quantization import requested_weights, requests
from normfuse.passes.insert_quantizers import InsertQuantizers
from normfuse.passes.place_quantizers import PlaceQuantizers
from normfuse.precision import round_all_to_nearest
from normfuse.precision.put_back import Decided, output_error, put_back, quantized_blocks
from normfuse.quant import IntegerType, Range
from normfuse.quant.bits import Bits
from normfuse.testing import Small, distance, observed_ranges, randomized, seeded

W8A8, W8A16 = onnx_placement("avx512_vnni"), onnx_placement("avx512_vnni", Bits.parse("w8a16"))


def network(m: Any, x: Tensor) -> Tensor:
    x = m.stem(x).relu()
    x = x + m.second(m.first(x).relu())
    result: Tensor = m.head(nn.functional.gelu(x))
    return result


def decided(bits: str, *, operands: bool = False) -> Decided:
    parts = {
        "stem": nn.Linear(12, 16),
        "first": nn.Linear(16, 24),
        "second": nn.Linear(24, 16, bias=False),
        "head": nn.Linear(16, 9),
    }
    graph = capture(randomized(Small(network, **parts)), (samples(2, 0),))
    placement = onnx_placement("avx512_vnni", Bits.parse(bits))
    PlaceQuantizers(placement=replace(placement, attention_operands=operands)).run(graph)
    ranges = observed_ranges(graph, samples(64, 1))
    return Decided(graph=graph, ranges=ranges, quantization=round_all_to_nearest(graph, ranges))


def samples(count: int, seed: int) -> Tensor:
    return torch.randn(count, 12, generator=seeded(seed))


def simulated(found: Decided) -> Graph:
    graph, chosen = found.graph.copy(), found.quantization
    InsertQuantizers(activations=chosen.activations, weights=chosen.weights).run(graph)
    return graph


def error(found: Decided) -> float:
    x = samples(32, 2)
    return output_error(found, [[x]], [found.graph.run(x)])


def test_blocks_are_named_by_their_layers() -> None:
    blocks = quantized_blocks(decided("w4a4").graph)
    assert [block.layers for block in blocks] == [("stem",), ("first", "second"), ("head",)]
    assert [len(block.nodes) for block in blocks] == [2, 4, 2]


@pytest.mark.parametrize("bits", ["8", "w4a8", "w3a3", "w4a16"])
def test_all_blocks_in_float_are_the_float_network(bits: str) -> None:
    found = decided(bits)
    for block in quantized_blocks(found.graph):
        found = put_back(found, block, None)
    assert not found.quantization.weights
    assert not found.quantization.activations
    assert not requests(found.graph)
    x = samples(8, 3)
    assert torch.equal(simulated(found).run(x)[0], decided(bits).graph.run(x)[0])


@pytest.mark.parametrize(("bits", "wider"), [("w4a8", W8A8), ("w3a3", W8A8), ("w4a16", W8A16)])
def test_all_blocks_at_eight_bits_are_the_eight_bit_network(bits: str, wider: Any) -> None:
    found = decided(bits)
    for block in quantized_blocks(found.graph):
        found = put_back(found, block, wider)
    straight = decided("8" if wider is W8A8 else "w8a16").quantization
    for name, params in straight.activations.items():
        other = found.quantization.activations[name]
        assert (other.scale, other.zero_point, other.type) == (params.scale, params.zero_point, params.type)
    for name, weight in straight.weights.items():
        assert torch.equal(found.quantization.weights[name].codes, weight.codes)


@pytest.mark.parametrize("wider", [W8A8, None], ids=["eight bits", "float"])
@pytest.mark.parametrize("index", [0, 1, 2])
def test_one_block_changes_and_the_error_falls(index: int, wider: Any) -> None:
    found = decided("w3a3")
    block = quantized_blocks(found.graph)[index]
    wide = put_back(found, block, wider)
    assert error(wide) < error(found)
    for name, weight in found.quantization.weights.items():
        if name not in block.nodes:
            assert wide.quantization.weights[name] is weight
    changed = {name for name, weight in wide.quantization.weights.items() if weight.params.type.bits == 8}
    kept = requested_weights(wide.graph)
    assert changed == {node.name for node in kept if node.name in block.nodes}
    assert (changed == set()) is (wider is None)
    assert len(requests(found.graph)) == 4, "the decision that was given is not changed"


def test_the_error_is_that_of_the_inserted_graph() -> None:
    found, x = decided("w4a16"), samples(32, 2)
    (output,), (wanted,) = simulated(found).run(x), found.graph.run(x)
    expected = float((output - wanted).square().sum() / wanted.square().sum())
    assert error(found) == pytest.approx(expected, rel=1e-4)
    assert distance([output], [wanted]) > 1e-3


def test_a_tensor_that_two_blocks_read_as_codes_becomes_float_for_both() -> None:
    def shared(m: Any, x: Tensor) -> Tensor:
        result: Tensor = m.first(x).relu() @ m.turn + m.second(x)
        return result

    parts = {"first": nn.Linear(12, 12), "second": nn.Linear(12, 12), "turn": torch.eye(12)}
    graph = capture(randomized(Small(shared, **parts)), (samples(2, 0),))
    PlaceQuantizers(placement=replace(X86_VNNI, activation=IntegerType(4, signed=False))).run(graph)
    ranges = {request.source.name: Range(-3.0, 3.0) for request in requests(graph)}
    found = Decided(graph=graph, ranges=ranges, quantization=round_all_to_nearest(graph, ranges))
    for block in quantized_blocks(found.graph):
        found = put_back(found, block, None)
    x = samples(5, 4)
    assert torch.equal(simulated(found).run(x)[0], graph.copy().run(x)[0])
