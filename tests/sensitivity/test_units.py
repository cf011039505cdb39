"""Which maps share their bits, what they are expected to cost and use, and what the user's bits change of that."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any

import pytest
import torch
from small_subject import captured, made, placed
from torch import Tensor, nn

from normfuse.errors import UsageError
from normfuse.graph import Graph, query
from normfuse.graph.quantization import requested_weights, requests
from normfuse.precision.workload import Work
from normfuse.quant.allocation import allocate
from normfuse.quant.bits import FLOAT, Bits
from normfuse.quant.overrides import Overrides
from normfuse.sensitivity.sensitivity import Sensitivity
from normfuse.sensitivity.units import (
    BOPS,
    WEIGHT_BITS,
    Member,
    bits_by_map,
    members_of,
    options,
    overridden,
    units,
    use_of,
)
from normfuse.testing import seeded

TOKENS = torch.randn(2, 5, 9, generator=seeded(0))
IMAGES = torch.randn(2, 3, 6, 5, generator=seeded(0))


def attention(m: Any, x: Tensor) -> Tensor:
    """Queries, keys and values are of one tensor, and what follows of others."""
    y = m.stem(x).tanh()
    mixed = (m.q(y) @ m.k(y).transpose(1, 2)).softmax(-1) @ m.v(y)
    return m.head(mixed)  # type: ignore[no-any-return]


ATTENTION = made(
    stem=nn.Linear(9, 7), q=nn.Linear(7, 11), k=nn.Linear(7, 11), v=nn.Linear(7, 13), head=nn.Linear(13, 4)
)


def by_layers(members: list[Member]) -> dict[str, Member]:
    """Members by the layers of their maps, divided by blanks."""
    return {" ".join(work.layer for work in member.maps.values()): member for member in members}


def found_in(graph: Graph, x: Tensor) -> dict[str, Member]:
    return by_layers(members_of(graph, [x]))


@cache
def attention_graph(activation_bits: int = 8) -> Graph:
    return placed(captured(attention, TOKENS, parts=ATTENTION), activation_bits)


def members() -> dict[str, Member]:
    return found_in(attention_graph(), TOKENS)


def test_maps_that_read_one_tensor_are_one_member() -> None:
    found = members()
    assert list(found) == ["stem", "q k v", "head"]
    together = found["q k v"]
    assert together.name == next(iter(together.maps))
    assert together.parameters == 7 * (11 + 11 + 13)
    assert together.macs == 5 * 7 * (11 + 11 + 13), "five tokens of one sample"
    assert found["head"].macs == 5 * 13 * 4
    assert all(member.override is None for member in found.values())


def test_members_read_what_their_requests_stand_behind() -> None:
    graph = attention_graph()
    sources = {request.readers[0].name: request.source.name for request in requests(graph)}
    for member in members_of(graph, [TOKENS])[1:]:
        assert member.source == member.reads == sources[member.name]
        assert member.fixed is None


def test_what_enters_the_model_has_eight_bits() -> None:
    stem = members()["stem"]
    assert (stem.source, stem.reads, stem.fixed) == ("", attention_graph().inputs[0].name, 8)
    assert stem.allowed(Bits(4, 3)) == Bits(4, 8)
    assert stem.allowed(Bits(4, FLOAT)) == Bits(4, 8)
    assert stem.allowed(Bits(FLOAT, FLOAT)) == Bits(FLOAT, FLOAT)
    head = members()["head"]
    assert head.allowed(Bits(4, 3)) == Bits(4, 3)


def test_without_codes_of_activations_members_read_floats() -> None:
    graph = attention_graph(FLOAT)
    found = found_in(graph, TOKENS)
    assert list(found) == ["stem", "q k v", "head"]
    assert {(member.source, member.reads, member.fixed) for member in found.values()} == {("", "", None)}
    assert found["q k v"].allowed(Bits(4, 3)) == Bits(4, FLOAT)
    assert len({member.tie for member in found.values()}) == 3


Function = Callable[[Any, Tensor], Tensor]


def added(m: Any, x: Tensor) -> Tensor:
    y = m.a(x).relu()
    z = m.b(y).relu()
    return m.d(y + z) + m.c(z)  # type: ignore[no-any-return]


def added_in_another_shape(m: Any, x: Tensor) -> Tensor:
    y = m.a(x).relu()
    z = m.b(y).relu()
    return m.d((y.flatten(2) + z.reshape(-1, 3, 30).relu()).reshape(-1, 3, 6, 5)) + m.c(z)  # type: ignore[no-any-return]


def concatenated(m: Any, x: Tensor) -> Tensor:
    y = m.a(x).relu()
    z = m.b(y).relu()
    return m.d(torch.cat([y, z], 2)) + torch.cat([m.c(z)] * 2, 2)  # type: ignore[no-any-return]


def neither(m: Any, x: Tensor) -> Tensor:
    y = m.a(x).relu()
    z = m.b(y).relu()
    return m.d(y * z) + m.c(z)  # type: ignore[no-any-return]


CONVOLUTIONS = made(**{name: nn.Conv2d(3, 3, 3, padding=1) for name in "abcdef"})
TIED = [(added, True), (added_in_another_shape, True), (concatenated, True), (neither, False)]


@pytest.mark.parametrize(("function", "are_tied"), TIED)
def test_what_is_added_or_concatenated_is_tied(function: Function, are_tied: bool) -> None:
    found = found_in(placed(captured(function, IMAGES, parts=CONVOLUTIONS)), IMAGES)
    assert set(found) == set("abcd")
    assert found["b"].source
    assert found["c"].source
    assert found["b"].source != found["c"].source
    assert (found["b"].tie == found["c"].tie) is are_tied
    assert len({found[name].tie for name in "abd"}) == 3


def test_ties_go_on_from_sum_to_sum() -> None:
    """Two sums have nothing in common until a third has one of each."""

    def chain(m: Any, x: Tensor, *, are_joined: bool) -> Tensor:
        y = m.a(x).relu()
        z = m.b(y).relu()
        w = m.c(z).relu()
        v = m.d(w).relu()
        both = (y + z) * (w + v)
        return m.e(both + (z + v)) if are_joined else m.e(both + m.f(v))  # type: ignore[no-any-return]

    def ties(are_joined: bool) -> list[str]:
        graph = placed(captured(partial(chain, are_joined=are_joined), IMAGES, parts=CONVOLUTIONS))
        found = found_in(graph, IMAGES)
        return [found[layer].tie for layer in "bcd"]

    assert len(set(ties(are_joined=True))) == 1
    first, second, third = ties(are_joined=False)
    assert first == second != third


def test_a_tie_gets_one_width_of_activations() -> None:
    """Alone, b would have three bits and c eight."""
    graph = placed(captured(added, IMAGES, parts=CONVOLUTIONS))
    found = members_of(graph, [IMAGES])
    named = by_layers(found)
    weights = {name: {4: 0.0} for member in found for name in member.maps}
    damages = {
        named["b"].source: {3: 0.0, 8: 0.0},
        named["c"].source: {3: 5.0, 8: 0.0},
        named["d"].source: {3: 0.0, 8: 0.0},
    }
    score = Sensitivity(method="by hand", weights=weights, activations=damages)
    chosen = allocate(units(found, score, options([4], [3, 8]), use=use_of), {}).bits
    assert chosen[named["b"].name] == chosen[named["c"].name] == Bits(4, 8)
    assert chosen[named["d"].name] == Bits(4, 3), "it is tied to nothing"


PAIRS: list[tuple[list[int], list[int], list[str]]] = [
    ([4, 2], [8, 3], ["w2a3", "w2a8", "w4a3", "w4a8"]),
    ([4, 32], [8], ["w4a8", "float"]),
    ([4], [8, 32], ["w4a8", "w4a16"]),
    ([2, 32], [8, 32], ["w2a8", "w2a16", "float"]),
]


@pytest.mark.parametrize(("weights", "activations", "expected"), PAIRS)
def test_options_are_pairs_of_which_floats_are_one(
    weights: list[int], activations: list[int], expected: list[str]
) -> None:
    assert [bits.spelled for bits in options(weights, activations)] == expected


def work(parameters: int, macs: int, layer: str = "layer") -> Work:
    return Work(layer=layer, parameters=parameters, macs=macs)


PAIR = Member(name="q", maps={"q": work(10, 100), "k": work(3, 30)}, source="y", reads="y", fixed=None, tie="t")
FIXED = Member(name="stem", maps={"stem": work(7, 50)}, source="", reads="image", fixed=8, tie="image")
PLAIN = Member(name="plain", maps={"plain": work(5, 20)}, source="", reads="", fixed=None, tie="plain")
SCORE = Sensitivity(
    method="by hand",
    weights={"q": {2: 1.0, 8: 0.5}, "k": {2: 0.25, 8: 0.125}, "stem": {2: 3.0, 8: 2.0}, "plain": {2: 9.0, 8: 7.0}},
    activations={"y": {3: 10.0, 8: 20.0}},
)


def damages(member: Member, *choices: Bits) -> Mapping[Bits, float]:
    (unit,) = units([member], SCORE, choices, use=use_of)
    assert unit.name == member.name
    assert unit.damage.keys() == unit.use.keys()
    return unit.damage


def test_a_member_costs_what_its_maps_do_and_its_activation_once() -> None:
    found = damages(PAIR, Bits(2, 3), Bits(8, 8), Bits(2, FLOAT), Bits(FLOAT, FLOAT))
    assert found == {Bits(2, 3): 11.25, Bits(8, 8): 20.625, Bits(2, FLOAT): 1.25, Bits(FLOAT, FLOAT): 0.0}


def test_choices_that_are_no_other_for_a_member_are_one() -> None:
    choices = options([2, 8, 32], [3, 8, 32])
    assert len(choices) == 7
    assert damages(FIXED, *choices) == {Bits(2, 8): 3.0, Bits(8, 8): 2.0, Bits(FLOAT, FLOAT): 0.0}
    assert damages(PLAIN, *choices) == {Bits(2, FLOAT): 9.0, Bits(8, FLOAT): 7.0, Bits(FLOAT, FLOAT): 0.0}


def test_use_is_of_bits_alone() -> None:
    """13 parameters of 4 bits; 130 products of 4 by 3."""
    assert use_of(PAIR, Bits(4, 3)) == {WEIGHT_BITS: 52, BOPS: 1560}
    (unit,) = units([PAIR], SCORE, [Bits(8, 3)], use=use_of)
    assert unit.use == {Bits(8, 3): {WEIGHT_BITS: 104, BOPS: 3120}}
    assert unit.tie == "t"


def test_the_rest_is_one_unit_without_a_choice() -> None:
    *found, rest = units([PAIR, FIXED], SCORE, [Bits(8, 8)], use=use_of, rest={WEIGHT_BITS: 5.0, BOPS: 0.0})
    assert [unit.name for unit in found] == ["q", "stem"]
    assert list(rest.damage.values()) == [0.0]
    assert list(rest.use.values()) == [{WEIGHT_BITS: 5.0, BOPS: 0.0}]
    assert rest.tie is None


def given(text: str) -> dict[str, Member]:
    graph = attention_graph()
    return by_layers(overridden(members_of(graph, [TOKENS]), Overrides.parse(text)))


def test_overrides_win() -> None:
    found = given("q=2 k=2 head=w4a3")
    assert {layer: member.override for layer, member in found.items()} == {
        "stem": None,
        "q k v": Bits(2, 8),
        "head": Bits(4, 3),
    }
    names = [name for member in found.values() for name in member.maps]
    score = Sensitivity(
        method="by hand",
        weights={name: {8: 1.0} for name in names},
        activations={member.source: {8: 1.0} for member in found.values() if member.source},
    )
    every = units(list(found.values()), score, [Bits(8, 8)], use=use_of)
    assert [list(unit.damage) for unit in every] == [[Bits(8, 8)], [Bits(2, 8)], [Bits(4, 3)]]
    assert [unit.tie for unit in every] == [found["stem"].tie, None, None], "what the user gave is tied to nothing"
    # What was not scored costs nothing: there is no choice to compare.
    assert [list(unit.damage.values()) for unit in every] == [[1.0], [1.0], [0.0]]
    assert found["head"].allowed(Bits(8, 8)) == Bits(4, 3)


def test_overrides_by_pattern() -> None:
    assert {layer for layer, member in given("?=4").items() if member.override == Bits(4, 8)} == {"q k v"}
    assert all(member.override == Bits(FLOAT, FLOAT) for member in given("*=32").values())


def test_an_override_of_the_first_layer_keeps_the_codes_of_the_image_or_none() -> None:
    assert given("stem=w4a8")["stem"].allowed(Bits(8, 8)) == Bits(4, 8)
    assert given("stem=32")["stem"].allowed(Bits(8, 8)) == Bits(FLOAT, FLOAT)
    assert given("stem=w4a16")["stem"].allowed(Bits(8, 8)) == Bits(4, FLOAT)
    with pytest.raises(UsageError, match="overrides cannot have stem=w4a3") as caught:
        given("stem=w4a3")
    assert "as stem=w4a8: it reads what enters the model" in str(caught.value)


def test_different_bits_for_one_tensor_are_refused() -> None:
    with pytest.raises(UsageError, match=r"overrides cannot have q=w2a8 and v=w4a8") as caught:
        given("q=2 v=4")
    assert "give q, k, v one width" in str(caught.value)


def test_patterns_that_fit_no_layer_are_refused() -> None:
    with pytest.raises(UsageError, match="no layer that can have bits is called so") as caught:
        given("heads=8")
    assert "did you mean head?" in str(caught.value)


def test_codes_in_front_of_a_map_that_reads_floats_are_refused() -> None:
    graph = attention_graph(FLOAT)
    found = members_of(graph, [TOKENS])
    with pytest.raises(UsageError, match="head"):
        overridden(found, Overrides.parse("head=w4a8"))
    assert by_layers(overridden(found, Overrides.parse("head=w4a16")))["head"].override == Bits(4, FLOAT)


def test_bits_of_every_map() -> None:
    bits = bits_by_map([PAIR, FIXED], {"q": Bits(4, 3), "stem": Bits(2, 8)})
    assert bits == {"q": Bits(4, 3), "k": Bits(4, 3), "stem": Bits(2, 8)}


def test_members_hold_every_map_once() -> None:
    graph = attention_graph()
    names = [name for member in members_of(graph, [TOKENS]) for name in member.maps]
    assert names == [node.name for node in requested_weights(graph)]
    assert {query.layer_of(node) for node in requested_weights(graph)} == set(ATTENTION)
