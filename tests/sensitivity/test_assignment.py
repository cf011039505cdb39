"""Every map of a graph with requests gets the bits that were chosen for it, and what it reads their codes."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache, partial
from typing import Any

import pytest
import torch
from small_subject import captured, made, placed, placement_of
from torch import Tensor, nn

from normfuse.export.placement import X86_VNNI, with_bits
from normfuse.graph import Graph, query, verify
from normfuse.graph.quantization import WeightRequest, requested_weights, requests
from normfuse.precision.assignment import assigned, may_narrow, wanted_weight
from normfuse.quant import IntegerType
from normfuse.quant.bits import FLOAT, Bits
from normfuse.quant.code_kinds import WeightCodes
from normfuse.testing import seeded

X = torch.randn(2, 48, generator=seeded(0))
PARTS = made(a=nn.Linear(48, 32), b=nn.Linear(32, 11), c=nn.Linear(32, 11, bias=False), d=nn.Linear(11, 3))

EIGHT = Bits(8, 8)
SIGNED_8 = IntegerType(8, signed=True, narrow=True)


def function(m: Any, x: Tensor) -> Tensor:
    y = m.a(x).relu()
    return m.d(m.b(y) * m.c(y).sigmoid())  # type: ignore[no-any-return]


@cache
def graph(activation_bits: int = 8) -> Graph:
    return placed(captured(function, X, parts=PARTS), activation_bits)


def with_these(bits: Mapping[str, Bits], activation_bits: int = 8) -> Graph:
    """Bits by layer; what was there before is not touched."""
    names = {query.layer_of(node) or "": node.name for node in requested_weights(graph())}
    before = graph(activation_bits).text()
    found = assigned(graph(activation_bits), {names[layer]: each for layer, each in bits.items()}, placement_of)
    assert graph(activation_bits).text() == before
    verify(found)
    torch.testing.assert_close(found.run(X), graph().run(X), atol=0, rtol=0)  # requests hand on what they get
    return found


def weights(found: Graph) -> dict[str, WeightRequest]:
    """By layer."""
    return {query.layer_of(node) or "": asked for node, asked in requested_weights(found).items()}


def activations(found: Graph) -> dict[str, IntegerType]:
    """By the layers that read codes."""
    readers = {each.node: [query.layer_of(reader) or "" for reader in each.readers] for each in requests(found)}
    return {" ".join(readers[each.node]): each.type for each in requests(found)}


def unsigned(bits: int) -> IntegerType:
    return IntegerType(bits, signed=False)


def signed(bits: int) -> WeightRequest:
    return WeightRequest(SIGNED_8 if bits == 8 else IntegerType(bits, signed=True))


def test_maps_and_what_they_read_have_their_bits() -> None:
    found = with_these({"b": Bits(4, 3), "c": Bits(2, 3), "d": Bits(3, 5)})
    assert weights(found) == {"a": signed(8), "b": signed(4), "c": signed(2), "d": signed(3)}
    assert activations(found) == {"a": unsigned(8), "b c": unsigned(3), "d": unsigned(5)}


def test_others_keep_theirs() -> None:
    found = with_these({"d": Bits(4, 3)})
    assert weights(found) == {"a": signed(8), "b": signed(8), "c": signed(8), "d": signed(4)}
    assert activations(found) == {"a": unsigned(8), "b c": unsigned(8), "d": unsigned(3)}
    assert with_these({}).text() == graph().text()


def test_one_of_two_readers_may_be_named() -> None:
    """The other reads the same codes, and keeps its weight."""
    found = with_these({"c": Bits(4, 3)})
    assert weights(found)["b"] == signed(8)
    assert activations(found)["b c"] == unsigned(3)


def test_readers_of_one_tensor_with_two_widths_are_a_bug_of_ours() -> None:
    with pytest.raises(ValueError, match="too many values"):
        with_these({"b": Bits(4, 3), "c": Bits(4, 8)})


def test_what_enters_the_model_is_not_narrowed() -> None:
    found = with_these({"a": Bits(4, 3)})
    assert weights(found)["a"] == signed(4)
    assert activations(found)["a"] == unsigned(8)
    assert [may_narrow(request) for request in requests(graph())] == [False, True, True]


@pytest.mark.parametrize(("layer", "left"), [("a", ["b c", "d"]), ("d", ["a", "b c"])])
def test_floats_withdraw_codes_and_weights(layer: str, left: list[str]) -> None:
    found = with_these({layer: Bits(FLOAT, FLOAT)})
    assert list(activations(found)) == left
    assert set(weights(found)) == set("abcd") - {layer}


def test_floats_in_front_of_codes_of_weights_have_groups() -> None:
    """32 inputs share a scale of c; the 16 of 48 are those of a, and 11 cannot be divided."""
    found = with_these({"a": Bits(4, FLOAT), "b": Bits(3, FLOAT), "c": Bits(8, FLOAT), "d": Bits(2, FLOAT)})
    assert activations(found) == {}
    assert weights(found) == {
        "a": WeightRequest(IntegerType(4, signed=True), group=16),
        "b": WeightRequest(IntegerType(3, signed=True), group=32),
        "c": WeightRequest(SIGNED_8),
        "d": WeightRequest(IntegerType(2, signed=True)),
    }


def test_one_reader_may_have_a_float_weight_where_the_other_has_codes() -> None:
    found = with_these({"b": Bits(FLOAT, FLOAT), "c": Bits(4, FLOAT)})
    assert list(activations(found)) == ["a", "d"]
    assert set(weights(found)) == set("acd")
    assert weights(found)["c"].group == 32


@pytest.mark.parametrize("layer", "abcd")
def test_in_a_graph_of_float_activations_weights_change_alone(layer: str) -> None:
    found = with_these({layer: Bits(4, FLOAT)}, FLOAT)
    assert requests(found) == []
    assert weights(found)[layer].type == IntegerType(4, signed=True)
    assert {weights(found)[other].type for other in set("abcd") - {layer}} == {SIGNED_8}
    assert set(weights(with_these({layer: Bits(FLOAT, FLOAT)}, FLOAT))) == set("abcd") - {layer}


def test_codes_that_convolutions_write_for_sums_stay() -> None:
    """Only what a map reads is narrowed; the sum of both is read by one."""
    x, parts = (
        torch.randn(2, 3, 8),
        made(a=nn.Conv1d(3, 3, 3, padding=1), b=nn.Conv1d(3, 3, 3, padding=1), c=nn.Conv1d(3, 3, 8)),
    )
    convolutions = placed(captured(lambda m, x: m.c(m.a(x) + m.b(x)), x, parts=parts))
    found = assigned(convolutions, {node.name: Bits(4, 3) for node in requested_weights(convolutions)}, placement_of)
    assert [request.type.bits for request in requests(found)] == [8, 8, 8, 3]
    assert {asked.type.bits for asked in requested_weights(found).values()} == {4}


ASYMMETRIC = partial(with_bits, X86_VNNI, weights=WeightCodes.ASYMMETRIC)

WANTED = [
    (EIGHT, WeightRequest(IntegerType(8, signed=True), is_symmetric=False)),
    (Bits(4, 8), WeightRequest(IntegerType(4, signed=True), is_symmetric=False)),
    (Bits(4, FLOAT), WeightRequest(IntegerType(4, signed=True), group=16, is_symmetric=False)),
    (Bits(8, FLOAT), WeightRequest(IntegerType(8, signed=True))),
]


@pytest.mark.parametrize(("bits", "expected"), WANTED)
def test_zero_points_are_where_the_target_takes_them(bits: Bits, expected: WeightRequest) -> None:
    """Behind floats only with groups."""
    (node,) = (node for node in requested_weights(graph()) if query.layer_of(node) == "a")
    assert wanted_weight(node, ASYMMETRIC(bits)) == expected


def test_convolutions_have_no_groups() -> None:
    convolution = placed(captured(lambda m, x: m.a(x), torch.randn(2, 32, 5), parts=made(a=nn.Conv1d(32, 4, 1))))
    (node,) = requested_weights(convolution)
    assert wanted_weight(node, placement_of(Bits(4, FLOAT))) == signed(4)
