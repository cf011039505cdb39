"""What rounding changes at its place, part by part, against the arithmetic in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_subject import EPS, activation_named, layer, made, map_named, subject_of, tensor, weight_of
from torch import Tensor, nn

from normfuse.calibration import Ranges
from normfuse.quant import QuantParams
from normfuse.quant.bits import Bits
from normfuse.sensitivity.rounding_errors import RoundingError, bare, rounding_errors
from normfuse.sensitivity.sensitivity import Kind
from normfuse.sensitivity.subject import Subject
from normfuse.sensitivity.watched_run import WatchedRun
from normfuse.testing import seeded

X = torch.randn(5, 6, 7, 4, generator=seeded(0))


def found_in(subject: Subject) -> dict[tuple[Kind, str, int], RoundingError]:
    """The errors of the only chunk."""
    (chunk,) = subject.chunks
    errors = list(rounding_errors(subject, WatchedRun.of(subject, chunk)))
    found = {(each.kind, each.name, each.bits): each for each in errors}
    assert len(found) == len(errors)
    return found


def test_every_part_at_every_width() -> None:
    parts = made(a=nn.Linear(9, 7), b=nn.Linear(7, 3))
    subject = subject_of(lambda m, x: m.b(m.a(x).relu()), torch.randn(5, 9), parts=parts)
    first, second = subject.maps
    (activation,) = subject.activations
    wanted = {
        (Kind.WEIGHT, node.name, bits): (node, (5, n)) for node, n in ((first, 7), (second, 3)) for bits in (2, 4, 8)
    }
    wanted |= {(Kind.ACTIVATION, activation.source.name, bits): (activation.node, (5, 7)) for bits in (3, 8)}
    found = found_in(subject)
    assert {key: (each.place, tuple(each.error.shape)) for key, each in found.items()} == wanted
    assert not any(each.error.requires_grad for each in found.values())


def test_two_codes_by_hand() -> None:
    """The largest value is 1, the last of eight codes that are 1/7 apart: 0.45 goes to 3/7, 0.1 to 1/7, 0.9 to 6/7."""
    x = tensor([1.0, 0.45, 0.1, 0.9], [0.0, 0.0, -1.0, 0.0])
    subject = subject_of(lambda m, x: m.a(x.relu()), x, parts={"a": layer([1.0, 0.0, 2.0, 0.0])})
    (request,) = subject.activations
    error = found_in(subject)[Kind.ACTIVATION, request.source.name, 3].error
    expected = tensor([0.0, 3 / 7 - 0.45, 1 / 7 - 0.1, 6 / 7 - 0.9], [0.0, 0.0, 0.0, 0.0])
    torch.testing.assert_close(error, expected, atol=2 * EPS, rtol=0)


def _conv(x: Tensor, weight: Tensor) -> Tensor:
    return F.conv2d(x, weight, None, stride=(2, 1), padding=(1, 0), groups=2)


def _linear(x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(x, weight)


MAPS: list[Any] = [
    pytest.param(nn.Conv2d(6, 4, (3, 2), stride=(2, 1), padding=(1, 0), groups=2), _conv, id="convolution"),
    pytest.param(nn.Conv2d(6, 4, (3, 2), stride=(2, 1), padding=(1, 0), groups=2, bias=False), _conv, id="no bias"),
    pytest.param(nn.Linear(4, 9), _linear, id="linear"),
]


@pytest.mark.parametrize(("part", "function"), MAPS)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_weights_err_by_what_the_map_makes_of_their_difference(
    part: nn.Module, function: Callable[[Tensor, Tensor], Tensor], bits: int
) -> None:
    subject = subject_of(lambda m, x: m.a(x), X, parts=made(a=part))
    (node,) = subject.maps
    difference = subject.weight(node, bits).values.double() - weight_of(subject, node).double()
    found = found_in(subject)[Kind.WEIGHT, node.name, bits].error
    expected = function(X.double(), difference)
    # The difference is rounded once, and sums of at most 18 products of it are.
    largest = function(X.double().abs(), difference.abs()).abs().max()
    torch.testing.assert_close(found.double(), expected, atol=20 * EPS * float(largest), rtol=0)


@pytest.mark.parametrize(("part", "function"), MAPS)
def test_bare_maps_have_no_bias(part: nn.Module, function: Callable[[Tensor, Tensor], Tensor]) -> None:
    subject = subject_of(lambda m, x: m.a(x), X, parts=made(a=part))
    (node,) = subject.maps
    weight = weight_of(subject, node).detach()
    expected = function(X.double(), weight.double())
    largest = function(X.double().abs(), weight.double().abs()).max()
    torch.testing.assert_close(bare(node, X, weight).double(), expected, atol=18 * EPS * float(largest), rtol=0)


def test_errors_in_a_quantized_network_are_those_of_what_it_reads_there() -> None:
    """Behind 2-bit weights and 3-bit activations: the activation's error of what came, the weight's of its codes."""
    parts = made(a=nn.Linear(9, 7), b=nn.Linear(7, 3))
    subject = subject_of(lambda m, x: m.b(m.a(x).relu()), torch.randn(5, 9, generator=seeded(1)), parts=parts)
    base = subject.uniform(Bits(2, 3))
    (chunk,) = subject.chunks
    errors = {
        (each.kind, each.name, each.bits): each.error
        for each in rounding_errors(subject, WatchedRun.of(subject, chunk, base=base))
    }
    (request,), second = subject.activations, map_named(subject, "b")
    (params,) = base.activations.values()
    assert isinstance(params, QuantParams)
    first = base.weights[map_named(subject, "a").name]
    assert first.bias is not None
    came = F.linear(chunk[0].double(), first.values.double(), first.bias.double()).relu()
    codes = (came / params.scale.double()).round().clamp(0, 7) * params.scale.double()
    tolerance = 16 * EPS * float(came.max())
    torch.testing.assert_close(
        errors[Kind.ACTIVATION, request.source.name, 3].double(), codes - came, atol=tolerance, rtol=0
    )
    difference = base.weights[second.name].values.double() - weight_of(subject, second).double()
    largest = float((codes @ difference.T.abs()).max())
    torch.testing.assert_close(
        errors[Kind.WEIGHT, second.name, 2].double(), codes @ difference.T, atol=16 * EPS * largest, rtol=0
    )


def test_what_has_no_range_has_no_errors() -> None:
    parts = made(a=nn.Linear(9, 7), b=nn.Linear(7, 3))
    subject = subject_of(lambda m, x: m.b(m.a(x).relu()), torch.randn(5, 9), parts=parts)
    subject = replace(subject, ranges={3: Ranges({}, 5), 8: subject.ranges[8]})
    assert {bits for kind, _, bits in found_in(subject) if kind is Kind.ACTIVATION} == {8}
    assert activation_named(subject, "b").source.name in {name for _, name, _ in found_in(subject)}
