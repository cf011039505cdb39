"""Where a network can be cut in two: one tensor passes, and all that was computed from weights before is in it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from normfuse.graph import metadata, query
from normfuse.graph.graph import Graph

__all__ = ["Compute", "Segment", "joined", "leading_to", "read_after", "run_segment", "segments", "with_floats"]

Compute = Callable[[fx.Node, tuple[Any, ...], dict[str, Any]], Any]
"""From a call, its arguments and its keyword arguments to its value."""


@dataclass(frozen=True, slots=True, eq=False)
class Segment:
    """Consecutive nodes of a graph.

    Attributes:
        nodes: in graph order, without constants.
        entries: what they read that was computed before: tensors and sizes.
        exits: what they compute that is read after them.
    """

    nodes: tuple[fx.Node, ...]
    entries: tuple[fx.Node, ...]
    exits: tuple[fx.Node, ...]


def segments(graph: Graph, *, wanted: Callable[[fx.Node], bool]) -> list[Segment]:
    """Cut a graph wherever one tensor alone carries what weights have made of the inputs (ours).

    In a transformer that is between attention and MLP of every block, in a residual network behind every sum. Values
    that no weight has touched (sizes, masks, positions) may pass beside it. Every segment but the last holds at least
    one wanted node; together they are all nodes in order.
    """
    order = [node for node in graph.nodes if node.op not in ("placeholder", "get_attr", "output")]
    position = {node: index for index, node in enumerate(order)}
    made = _made_from_weights(order)
    last = {node: max((position.get(user, len(order)) for user in node.users), default=0) for node in order}
    starts, open_, has_wanted = [0], set[fx.Node](), False
    for index, node in enumerate(order):
        open_ = {held for held in (*open_, node) if last[held] > index and held in made}
        has_wanted |= wanted(node)
        if len(open_) == 1 and has_wanted and any(wanted(rest) for rest in order[index + 1 :]):
            starts.append(index + 1)
            has_wanted = False
    ends = [*starts[1:], len(order)]
    return [_segment(order[start:end]) for start, end in zip(starts, ends, strict=True)]


def leading_to(segment: Segment, node: fx.Node) -> Segment:
    """Return the part of a segment that makes one value of it; no nodes where the value is an entry."""
    needed, inside = {node}, set(segment.nodes)
    for each in reversed(segment.nodes):
        if each in needed:
            needed.update(each.all_input_nodes)
    exits = (node,) if node in inside else ()
    return Segment(tuple(each for each in segment.nodes if each in needed), segment.entries, exits)


def joined(parts: Sequence[Segment]) -> Segment:
    """Return consecutive segments as one."""
    return _segment([node for part in parts for node in part.nodes])


def with_floats(segment: Segment) -> Segment:
    """Return a segment that has floating-point exits: where it hands on integers alone, what these were read off."""
    if any(query.is_float(node) for node in segment.exits):
        return segment
    inside, found = set(segment.nodes), dict[fx.Node, None]()
    open_ = list(segment.exits)
    while open_:
        node = open_.pop()
        if query.is_float(node):
            found[node] = None
        else:
            open_ += [source for source in node.all_input_nodes if source in inside]
    return replace(segment, exits=(*segment.exits, *sorted(found)))


def read_after(graph: Graph, parts: Sequence[Segment]) -> set[fx.Node]:
    """Return what the rest of a graph reads of what stands before it, its outputs with it."""
    return {node for part in parts for node in part.entries} | set(graph.outputs)


def run_segment(graph: Graph, segment: Segment, values: dict[fx.Node, Any], compute: Compute) -> None:
    """Compute a segment's nodes from its entries in ``values``; leave its exits there.

    Values that only the segment reads are not kept.
    """
    local = dict[fx.Node, Any]()

    def value_of(node: fx.Node) -> Any:
        if node.op == "get_attr":
            return metadata.attribute(graph.module, str(node.target))
        return local[node] if node in local else values[node]

    last = {source: node for node in segment.nodes for source in node.all_input_nodes}
    kept = set(segment.exits)
    for node in segment.nodes:
        local[node] = compute(node, fx.map_arg(node.args, value_of), fx.map_arg(node.kwargs, value_of))
        for source in node.all_input_nodes:
            if last[source] is node and source not in kept:
                local.pop(source, None)
    values.update({node: local[node] for node in segment.exits})


def _made_from_weights(order: list[fx.Node]) -> set[fx.Node]:
    """Return the tensors that depend on a floating-point constant."""
    made = set[fx.Node]()
    for node in order:
        reads_weight = any(
            source in made or (source.op == "get_attr" and query.dtype(source).is_floating_point)
            for source in node.all_input_nodes
        )
        if reads_weight and not isinstance(metadata.value_of(node), (int, float, torch.SymInt)):
            made.add(node)
    return made


def _segment(nodes: list[fx.Node]) -> Segment:
    inside = set(nodes)
    entries = (source for node in nodes for source in node.all_input_nodes)
    before = dict.fromkeys(source for source in entries if source not in inside and source.op != "get_attr")
    exits = tuple(node for node in nodes if any(user not in inside for user in node.users))
    return Segment(tuple(nodes), tuple(before), exits)
