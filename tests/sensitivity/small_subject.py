"""Subjects made of networks of a few lines, and the references that scores of them are compared with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any, Final

import torch
from torch import Tensor, fx, nn

from normfuse.export.placement import X86_VNNI, with_bits
from normfuse.graph import Graph, capture, query
from normfuse.graph.quantization import QuantizationRequest
from normfuse.passes.place_quantizers import PlaceQuantizers
from normfuse.precision.assignment import PlacementOf
from normfuse.quant.bits import FLOAT, MOST, Bits
from normfuse.quant.calibration_method import CalibrationMethod
from normfuse.rewrite.linear_map import read_linear_map
from normfuse.sensitivity.subject import Subject, ranges_by_width
from normfuse.testing import Small, randomized

__all__ = [
    "EPS",
    "activation_named",
    "captured",
    "layer",
    "made",
    "map_named",
    "placed",
    "placement_of",
    "scored",
    "subject_of",
    "tensor",
    "weight_of",
]

EPS: Final = torch.finfo(torch.float32).eps

placement_of: PlacementOf = partial(with_bits, replace(X86_VNNI, smallest_inner=1))
"""That of x86, for maps of two inputs, too."""


class Several(Small):
    """``Small`` with several inputs."""

    def forward(self, *inputs: Tensor) -> Any:
        return self._function(self, *inputs)


def tensor(*rows: object) -> Tensor:
    return torch.tensor(rows, dtype=torch.float32)


def layer(*rows: list[float], bias: list[float] | None = None) -> nn.Linear:
    """A linear map of these weights."""
    made = nn.Linear(len(rows[0]), len(rows), bias=bias is not None)
    made.weight.data = tensor(*rows)
    if bias is not None:
        made.bias.data = torch.tensor(bias)
    return made


def made(**parts: nn.Module) -> dict[str, nn.Module]:
    """Parts with random numbers, different ones in each."""
    return {name: randomized(part, seed=seed) for seed, (name, part) in enumerate(parts.items())}


def captured(function: Callable[..., Any], *inputs: Tensor, parts: Mapping[str, nn.Module]) -> Graph:
    """The graph of ``function(self, *inputs)``, the parts being attributes."""
    return capture(Several(function, **parts).eval(), inputs)


def placed(graph: Graph, activation_bits: int = MOST) -> Graph:
    """The graph with requests, in place."""
    PlaceQuantizers(placement=placement_of(Bits(MOST, activation_bits))).run(graph)
    return graph


def subject_of(
    function: Callable[..., Any],
    *inputs: Tensor,
    sizes: Sequence[int] = (),
    weight_widths: tuple[int, ...] = (2, 4, 8),
    activation_widths: tuple[int, ...] = (3, 8),
    parts: Mapping[str, nn.Module],
) -> Subject:
    """A network of these parts, scored on the inputs in chunks of these sizes; ranges are the least and the largest."""
    graph = placed(captured(function, *inputs, parts=parts), MOST if activation_widths else FLOAT)
    return scored(graph, *inputs, sizes=sizes, widths=(weight_widths, activation_widths))


def scored(
    graph: Graph,
    *inputs: Tensor,
    sizes: Sequence[int] = (),
    widths: tuple[tuple[int, ...], tuple[int, ...]] = ((2, 4, 8), (3, 8)),
) -> Subject:
    """A graph with requests, see ``subject_of``."""
    count, step = len(inputs[0]), 1 if graph.has_dynamic_batch else len(inputs[0])
    ranges = ranges_by_width(
        graph,
        lambda: iter([[x[at : at + step] for x in inputs] for at in range(0, count, step)]),
        placement_of=placement_of,
        widths=widths[1],
        method=CalibrationMethod.MIN_MAX,
    )
    ends = [sum(sizes[:count]) for count in range(len(sizes) + 1)] if sizes else [0, count]
    return Subject(
        graph=graph,
        chunks=[[x[start:end] for x in inputs] for start, end in pairwise(ends)],
        placement_of=placement_of,
        weight_widths=widths[0],
        activation_widths=widths[1],
        ranges=ranges,
    )


def map_named(subject: Subject, layer: str) -> fx.Node:
    """The node of a linear map by its layer's name."""
    (found,) = (node for node in subject.maps if query.layer_of(node) == layer)
    return found


def activation_named(subject: Subject, reader: str) -> QuantizationRequest:
    """The scored activation that a layer reads."""
    (found,) = (each for each in subject.activations if map_named(subject, reader) in each.readers)
    return found


def weight_of(subject: Subject, node: fx.Node) -> Tensor:
    """The exact weight of a linear map."""
    found = read_linear_map(subject.graph, node)
    assert found is not None
    return found.weight
