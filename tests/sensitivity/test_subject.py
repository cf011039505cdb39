"""A subject knows its maps and activations, and the codes of each at every width."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache

import pytest
import torch
from small_subject import (
    EPS,
    activation_named,
    captured,
    layer,
    made,
    map_named,
    placed,
    placement_of,
    subject_of,
    tensor,
    weight_of,
)
from torch import Tensor, nn

from normfuse.calibration import Ranges, calibrate
from normfuse.graph.quantization import requested_weights, requests
from normfuse.precision.assignment import assigned
from normfuse.quant import IntegerType, PerGroup, QuantParams, round_to_nearest
from normfuse.quant.bits import FLOAT, Bits
from normfuse.quant.calibration_method import CalibrationMethod
from normfuse.sensitivity.subject import Subject, ranges_by_width
from normfuse.testing import seeded

X = torch.randn(5, 9, generator=seeded(0))


FIRST = nn.Linear(9, 7)


@cache
def branches() -> Subject:
    """Two maps read one activation, and the last their product."""
    parts = made(a=FIRST, b=nn.Linear(7, 11), c=nn.Linear(7, 11), d=nn.Linear(11, 3))
    return subject_of(lambda m, x: m.d(m.b(y := m.a(x).relu()) * m.c(y)), X, sizes=(3, 2), parts=parts)


def test_maps_are_in_graph_order_and_activations_are_what_they_read() -> None:
    subject = branches()
    assert subject.maps == tuple(map_named(subject, name) for name in "abcd")
    one, other = subject.activations
    assert one.readers == [map_named(subject, "b"), map_named(subject, "c")]
    assert other.readers == [map_named(subject, "d")]
    assert subject.samples == 5


def test_what_enters_the_model_or_meets_no_map_is_not_scored() -> None:
    """The input of ``a`` has 8 bits; the two convolutions' outputs are codes, but only their sum is read by a map."""
    parts = made(**{name: nn.Conv1d(2, 2, 3, padding=1) for name in "abc"})
    subject = subject_of(lambda m, x: m.c(m.a(x) + m.b(x)), X[:, :8].reshape(5, 2, 4), parts=parts)
    assert len(requests(subject.graph)) == 4
    (only,) = subject.activations
    assert only.readers == [map_named(subject, "c")]


def test_weights_are_rounded_to_nearest_and_once() -> None:
    """Two rows of 4-bit codes times 1/2 and 1/8 have no error; of 8 bits the codes are as near as can be."""
    rows = [[-3.5, 1.0, 0.5, 3.5], [0.875, 0.125, -0.25, 0.0]]
    subject = subject_of(lambda m, x: m.a(x), torch.randn(2, 4), weight_widths=(2, 4), parts={"a": layer(*rows)})
    (node,) = subject.maps
    found = subject.weight(node, 4)
    assert found.codes.tolist() == [[-7, 2, 1, 7], [7, 1, -2, 0]]
    assert torch.equal(found.values, tensor(*rows))
    assert found.params.type == IntegerType(4, signed=True)
    assert subject.weight(node, 4) is found
    assert subject.weight(node, 2).params.type == IntegerType(2, signed=True)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_weights_of_every_map_have_their_own_codes(bits: int) -> None:
    subject = branches()
    for node in subject.maps:
        found = subject.weight(node, bits)
        type_ = IntegerType(bits, signed=True, narrow=bits == 8)
        expected = round_to_nearest(weight_of(subject, node), None, type_, input_scale=None)
        assert found.params.type == type_
        assert torch.equal(found.codes, expected.codes)
        assert torch.equal(found.params.scale, expected.params.scale)


def test_weights_behind_floats_have_groups_where_bits_are_few() -> None:
    x, parts = torch.randn(2, 48), made(a=nn.Linear(48, 5))
    subject = subject_of(lambda m, x: m.a(x), x, weight_widths=(3, 8), activation_widths=(), parts=parts)
    (node,) = subject.maps
    assert subject.activations == ()
    assert subject.weight(node, 3).params.granularity == PerGroup(1, 16)  # the power of two that divides 48
    assert subject.weight(node, 3).params.scale.shape == (5, 3)
    assert subject.weight(node, 8).params.scale.shape == (5,)


@pytest.mark.parametrize(("bits", "levels"), [(3, 8), (8, 256)])
def test_codes_of_activations_cover_what_was_seen(bits: int, levels: int) -> None:
    """What ``b`` reads is not negative: the smallest code is 0, the largest the largest value."""
    subject, largest = branches(), float(FIRST(X).detach().relu().max())
    found = subject.params(activation_named(subject, "b"), bits)
    assert isinstance(found, QuantParams)
    assert int(found.zero_point) == 0
    assert float(found.scale) == pytest.approx(largest / (levels - 1), rel=16 * EPS)
    assert found.type == IntegerType(bits, signed=False)


def test_what_the_samples_do_not_reach_has_no_codes() -> None:
    subject = replace(branches(), ranges={3: Ranges({}, 5), 8: branches().ranges[8]})
    one, other = subject.activations
    assert subject.params(one, 3) is None
    assert subject.params(one, 8) is not None
    assert subject.uniform(Bits(4, 3)).activations == {}
    assert subject.uniform(Bits(4, 8)).activations.keys() == {one.source.name, other.source.name}


def test_uniform_bits_are_those_of_every_part() -> None:
    subject = branches()
    found = subject.uniform(Bits(2, 3))
    assert list(found.weights) == [node.name for node in subject.maps]
    assert all(found.weights[node.name] is subject.weight(node, 2) for node in subject.maps)
    assert list(found.activations) == [each.source.name for each in subject.activations]
    for params in found.activations.values():
        assert isinstance(params, QuantParams)
        assert params.type.bits == 3


def samples() -> Iterator[Sequence[Tensor]]:
    """Enough for candidates to compete in, and a few values far off."""
    x = torch.randn(24, 9, generator=seeded(1))
    x[::5] *= 4
    return iter([[row[None]] for row in x])


def test_ranges_of_a_tensor_depend_on_its_own_width_alone() -> None:
    graph = branches().graph
    found = ranges_by_width(graph, samples, placement_of=placement_of, widths=[FLOAT, 3])
    assert found.keys() == {3, 8}
    maps = [node.name for node in requested_weights(graph)]
    mixed = assigned(
        graph, dict(zip(maps, [Bits(8, 8), Bits(8, 3), Bits(8, 3), Bits(8, 8)], strict=True)), placement_of
    )
    expected = calibrate(mixed, samples, method=CalibrationMethod.AUTO).by_name
    narrow = activation_named(branches(), "b").source.name
    assert found[3].by_name[narrow] == expected.pop(narrow)
    assert found[3].by_name[narrow] != found[8].by_name[narrow]
    assert {name: found[8].by_name[name] for name in expected} == expected


def test_ranges_of_a_mixed_graph_are_those_of_every_tensors_width() -> None:
    subject = branches()
    subject = replace(subject, ranges=ranges_by_width(subject.graph, samples, placement_of=placement_of, widths=(3,)))
    maps = [node.name for node in subject.maps]
    bits = dict(zip(maps, [Bits(8, 8), Bits(8, 8), Bits(8, 8), Bits(4, 3)], strict=True))
    found = subject.ranges_of(assigned(subject.graph, bits, placement_of))
    entering = subject.graph.inputs[0].name
    one, other = (each.source.name for each in subject.activations)
    widths = {entering: 8, one: 8, other: 3}
    assert dict(found.chosen) == {name: subject.ranges[width].chosen[name] for name, width in widths.items()}
    assert found.samples == 24


def test_a_withdrawn_request_has_no_range() -> None:
    subject = branches()
    maps = [node.name for node in subject.maps]
    bits = dict.fromkeys(maps, Bits(8, 8)) | {maps[3]: Bits(FLOAT, FLOAT)}
    found = subject.ranges_of(assigned(subject.graph, bits, placement_of))
    assert found.chosen.keys() == {subject.graph.inputs[0].name, activation_named(subject, "b").source.name}


def test_maps_without_a_constant_weight_are_not_scored() -> None:
    graph = placed(captured(lambda m, x: torch.nn.functional.linear(m.a(x), x[:, :7]), X, parts=made(a=FIRST)))
    found = Subject(
        graph=graph, chunks=[], placement_of=placement_of, weight_widths=(4,), activation_widths=(8,), ranges={}
    )
    assert [node.name for node in found.maps] == ["linear"]
    assert found.activations == ()
