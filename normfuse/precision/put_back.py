"""Gives one block of a quantized network more bits, or floats, and says how much of the network's error was its."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from normfuse.graph import Graph, query
from normfuse.graph.edit import editing
from normfuse.graph.quantization import (
    is_requested,
    request_weight,
    requested_weights,
    requests,
    retype,
    withdraw,
    withdraw_weight,
)
from normfuse.graph.segments import segments
from normfuse.precision.block import floating, summed_error
from normfuse.precision.chunks import samples_in
from normfuse.precision.decision import Quantization, decide_again
from normfuse.precision.simulation import Simulation
from normfuse.quant import Range
from normfuse.quant.placement import Placement

__all__ = ["Decided", "QuantizedBlock", "output_error", "put_back", "quantized_blocks", "widened"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Decided:
    """A float graph with requests, the ranges of their tensors, and the parameters and codes that they get."""

    graph: Graph
    ranges: Mapping[str, Range]
    quantization: Quantization


@dataclass(frozen=True, slots=True)
class QuantizedBlock:
    """A segment of the network by the names of its requests and linear maps, and the layers of the latter."""

    nodes: frozenset[str]
    layers: tuple[str, ...]


def quantized_blocks(graph: Graph, *, untouched: Collection[str] = ()) -> list[QuantizedBlock]:
    """Return the segments of a graph with requests that hold linear maps, in order; what is untouched is no part."""
    maps = requested_weights(graph)
    found = []
    for part in segments(graph, wanted=lambda node: node in maps):
        inside = [node for node in part.nodes if node in maps and node.name not in untouched]
        asked = {node.name for node in part.nodes if node in maps or is_requested(node)} - set(untouched)
        layers = tuple(dict.fromkeys(query.layer_of(node) or node.name for node in inside))
        if inside:
            found.append(QuantizedBlock(frozenset(asked), layers))
    return found


def put_back(decided: Decided, block: QuantizedBlock, wider: Placement | None) -> Decided:
    """Return the decision with a block in the types of ``wider``, in float without one.

    Weights and activations elsewhere stay what they are; the block's are rounded to nearest, its activations by the
    decision's ranges: those for few bits are clipped too much for more (see ``widened``).
    """
    graph = decided.graph.copy()
    nodes = [node for node in graph.nodes if node.name in block.nodes]
    _withdraw(graph, nodes) if wider is None else _widen(graph, nodes, wider)
    found = decide_again(graph, decided.ranges, decided.quantization)
    return replace(decided, graph=graph, quantization=found)


def widened(graph: Graph, blocks: Sequence[QuantizedBlock], wider: Placement) -> Graph:
    """Return a copy with all these blocks in the types of ``wider``, for ranges to be chosen for them."""
    found, names = graph.copy(), {name for block in blocks for name in block.nodes}
    _widen(found, [node for node in found.nodes if node.name in names], wider)
    return found


def _widen(graph: Graph, nodes: Sequence[fx.Node], wider: Placement) -> None:
    with editing(graph) as edit:
        for request in [each for each in requests(graph) if each.node in nodes]:
            if wider.activation is not None and request.group is None and request.type.bits < wider.activation.bits:
                retype(edit, request, wider.activation)
        for node, asked in requested_weights(graph).items():
            if node in nodes:
                group = asked.group if wider.is_dynamic else None  # else of a channel: groups are for few bits
                is_symmetric = asked.is_symmetric or (group is None and wider.activation is None)
                request_weight(node, wider.weight, group=group, is_symmetric=is_symmetric)


def _withdraw(graph: Graph, nodes: Sequence[fx.Node]) -> None:
    with editing(graph) as edit:
        for node in requested_weights(graph).keys() & set(nodes):
            withdraw_weight(node)
        for request in [each for each in requests(graph) if each.node in nodes]:
            withdraw(edit, request)


@torch.no_grad()
def output_error(decided: Decided, chunks: Sequence[Sequence[Tensor]], targets: Sequence[Sequence[Tensor]]) -> float:
    """Return the squared error of the network's outputs over their squares, the mean over samples.

    Args:
        decided: what is simulated.
        chunks: batches of samples, one tensor per input.
        targets: the float network's outputs.
    """
    simulation, total, count = Simulation(decided.quantization), 0.0, 0
    for chunk, wanted in zip(chunks, targets, strict=True):
        found = decided.graph.run_as(chunk, simulation)
        total += float(summed_error(floating(found), floating(wanted))) * samples_in(chunk)
        count += samples_in(chunk)
    return total / count
