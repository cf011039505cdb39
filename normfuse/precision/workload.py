"""What every linear map of a network costs to store and to run, and what its tensors hold at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from normfuse.graph import Graph, ops, query
from normfuse.graph.quantization import is_requested, requested_weights, requests
from normfuse.precision.chunks import samples_in
from normfuse.quant.bits import FLOAT
from normfuse.rewrite.linear_map import read_linear_map

__all__ = ["Step", "Work", "steps_of", "workload"]

BYTE = 8

ALIASES = frozenset({*ops.VIEWS, *ops.POINTWISE_KEEPING, ops.FLATTEN, ops.UNSQUEEZE, ops.T, ops.EXPAND})
"""Operators whose result takes no memory of its own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """One linear map: its layer, the elements of its weight, and its multiplications for one sample."""

    layer: str
    parameters: int
    macs: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """What is held in memory while one node computes, for one sample.

    Attributes:
        floats: bytes of what stays float.
        codes: elements of what may be held as codes, by the name of the request's source.
    """

    floats: float
    codes: Mapping[str, int]

    def within(self, other: Step) -> bool:
        """Return whether it never holds more than another step."""
        return self.floats <= other.floats and all(n <= other.codes.get(name, 0) for name, n in self.codes.items())


def workload(graph: Graph, sample: Sequence[Tensor]) -> dict[str, Work]:
    """Return the work of every map that is to be quantized, by its name, for inputs of the sample's sizes."""
    elements, count = _elements(graph, sample), samples_in(sample)
    found = {}
    for node in requested_weights(graph):
        if (linear := read_linear_map(graph, node)) is None:
            continue
        many = elements[node.args[0] if linear.is_transposed else node]  # type: ignore[index]
        layer = query.layer_of(node) or node.name
        macs = many * linear.weight[0].numel() // count
        found[node.name] = Work(layer=layer, parameters=linear.weight.numel(), macs=macs)
    return found


def steps_of(graph: Graph, sample: Sequence[Tensor]) -> list[Step]:
    """Return the steps of a run in which most is held, whatever widths codes get.

    Every tensor lives from the call that makes it to the last that reads it or a view of it. It is held as codes if
    all that read it or its views read codes, else as floats. An engine with other views or an other order holds more or
    less.
    """
    elements, count = _elements(graph, sample), samples_in(sample)
    coded = dict[fx.Node, str]()
    for each in requests(graph):
        if set(_readers(_root(each.source))) == {each.node}:
            coded[_root(each.source)] = each.source.name
    order = [node for node in graph.nodes if node.op in ("placeholder", "call_function")]
    last = _last_reads(order, set(graph.outputs))
    found = list[Step]()
    held = dict[fx.Node, int]()
    for at, node in enumerate(order):
        if node in elements and _root(node) is node:
            held[node] = elements[node] // count
        floats = sum(n * FLOAT / BYTE for each, n in held.items() if each not in coded)
        step = Step(floats=floats, codes={coded[each]: n for each, n in held.items() if each in coded})
        found = [each for each in found if not each.within(step)]
        if not any(step.within(each) for each in found):
            found.append(step)
        held = {each: n for each, n in held.items() if last[each] > at}
    return found


def _last_reads(order: Sequence[fx.Node], outputs: set[fx.Node]) -> dict[fx.Node, int]:
    last = dict[fx.Node, int]()
    for at, node in enumerate(order):
        for source in (node, *node.all_input_nodes):
            last[_root(source)] = at
    return last | {_root(node): len(order) for node in outputs}


def _root(node: fx.Node) -> fx.Node:
    """Return the node that made the memory that a view shows."""
    while is_requested(node) or query.is_call(node, *ALIASES):
        node = node.all_input_nodes[0]
    return node


def _readers(node: fx.Node) -> Iterator[fx.Node]:
    """Yield what reads a node or a view of it."""
    for reader in query.readers(node):
        if query.is_call(reader, *ALIASES):
            yield from _readers(reader)
        else:
            yield reader


def _elements(graph: Graph, sample: Sequence[Tensor]) -> dict[fx.Node, int]:
    found = dict[fx.Node, int]()

    def watch(node: fx.Node, value: Any) -> Any:
        if isinstance(value, Tensor):
            found[node] = value.numel()
        return value

    graph.run_watched(sample, watch)
    return found
