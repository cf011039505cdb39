"""A score taken again on a quantized network: what every width of one part adds there, above its best one."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from small_subject import made, map_named, subject_of
from torch import nn

from normfuse.precision.decision import Quantization
from normfuse.precision.simulation import Simulation
from normfuse.progress import Silent
from normfuse.quant.bits import FLOAT, Bits
from normfuse.sensitivity.choosing import rounded
from normfuse.sensitivity.output_loss import OutputLoss
from normfuse.sensitivity.refreshing import refreshed
from normfuse.sensitivity.sensitivity import Kind, Sensitivity
from normfuse.sensitivity.subject import Subject
from normfuse.testing import seeded

X = torch.randn(5, 9, generator=seeded(0))
PARTS = made(a=nn.Linear(9, 7), b=nn.Linear(7, 11), c=nn.Linear(11, 4))
BITS = {"a": Bits(2, 8), "b": Bits(4, 3), "c": Bits(FLOAT, FLOAT)}


@cache
def subject() -> Subject:
    return subject_of(lambda m, x: m.c(m.b(m.a(x).relu()).tanh()), X, sizes=(3, 2), parts=PARTS)


@cache
def decided() -> Quantization:
    return rounded(subject(), {map_named(subject(), layer).name: bits for layer, bits in BITS.items()})[1]


@cache
def found() -> Sensitivity:
    return refreshed(subject(), decided(), name="refresh 1", progress=Silent())


@torch.no_grad()
def loss(changed: Quantization) -> float:
    """Of the whole network, with one part changed; its image has 8-bit codes as it ships."""
    outputs = subject().graph.run_as([X], Simulation(changed))
    return float(OutputLoss.DIVERGENCE.per_sample(outputs, subject().graph.run(X)).mean())


@pytest.mark.parametrize("layer", PARTS)
def test_weights_are_tried_where_the_rest_is_quantized(layer: str) -> None:
    node = map_named(subject(), layer)
    losses = {bits: loss(decided().changed(weights={node.name: subject().weight(node, bits)})) for bits in (2, 4, 8)}
    least = min(losses.values())
    # What float32 adds to an output is a millionth of what two bits do.
    for bits, amount in found().weights[node.name].items():
        assert amount == pytest.approx(losses[bits] - least, abs=1e-5 * max(losses.values()))


def test_activations_are_tried_where_the_rest_is_quantized() -> None:
    for request in subject().activations:
        name, losses = request.source.name, dict[int, float]()
        for bits in (3, 8):
            params = subject().params(request, bits)
            assert params is not None
            losses[bits] = loss(decided().changed(activations={name: params}))
        for bits, amount in found().activations[name].items():
            expected = losses[bits] - min(losses.values())
            assert amount == pytest.approx(expected, abs=1e-5 * max(losses.values()))


def test_the_best_width_of_every_part_costs_nothing() -> None:
    assert found().method == "refresh 1"
    for kind, widths in ((Kind.WEIGHT, [2, 4, 8]), (Kind.ACTIVATION, [3, 8])):
        for row in found().of(kind).values():
            assert list(row) == widths
            assert min(row.values()) == 0
            assert max(row.values()) > 0
