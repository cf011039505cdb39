"""Forwards: an affine is taken off a tensor, and everything that reads it makes up for that.

Between the affine and the linear maps that take it in, each tensor ``v`` of the model is ``A(w)`` of the tensor ``w``
that is computed now; the tensor is said to carry ``A``.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import fx

from normfuse.graph import Graph, ops, query
from normfuse.graph.affine import AFFINE, Affine, read_affine
from normfuse.report import Reason
from normfuse.rewrite.changes import Blocked, Changes
from normfuse.rewrite.commuting import forward, source_of
from normfuse.rewrite.linear_map import LINEAR_MAPS, read_linear_map
from normfuse.rewrite.push import align, push

__all__ = ["Carrying"]


class Carrying:
    """Takes the affine ``start`` off for some of its readers and follows what they make of it.

    ``carried`` says which affine each tensor carries, ``changes`` what has to change. Where ``blocked`` is set, it
    cannot be done: ``entries`` are the readers through which the affine came there. With ``rescales``, tensors that
    meet a carrying one are divided by its scale where they are made (methods 13.4); without, they must carry the same
    affine.
    """

    def __init__(self, graph: Graph, start: fx.Node, readers: Iterable[fx.Node], *, rescales: bool) -> None:
        self._graph, self._start, self._rescales = graph, start, rescales
        self.carried: dict[fx.Node, Affine] = {}
        self._entries: dict[fx.Node, frozenset[fx.Node]] = {}
        self.readers = frozenset(readers)
        self.changes = Changes()
        self.rescaled = False
        self.blocked: Blocked | None = None
        self.entries: frozenset[fx.Node] = frozenset()
        self._follow(read_affine(graph, start))

    def _follow(self, found: Affine) -> None:
        started = False
        for node in self._graph.nodes:
            started = started or node is self._start
            if not started or node is self._start:
                continue
            incoming = {source: self.carried[source] for source in node.all_input_nodes if source in self.carried}
            entries = [self._entries[source] for source in incoming]
            if node in self.readers:
                incoming[self._start] = found
                entries.append(frozenset({node}))
            if not incoming:
                continue
            self._entries[node] = frozenset().union(*entries)
            if (reason := self._meet(node, incoming)) is not None:
                self.blocked = reason if isinstance(reason, Blocked) else Blocked(node, reason)
                self.entries = self._entries[node]
                return

    def _meet(self, node: fx.Node, incoming: dict[fx.Node, Affine]) -> Blocked | Reason | None:
        """Take the affine in, hand it on (the node then carries one), or say why not."""
        if node.op == "output":
            return Reason.GRAPH_OUTPUT
        if query.is_call(node, *LINEAR_MAPS):
            return self._into_linear(node, incoming)
        if query.is_call(node, AFFINE):
            (carried,) = incoming.values()
            return self.changes.carry_into_affine(self._graph, node, carried)
        if query.is_call(node, *ops.SPLITS, ops.ATEN.unbind.int):
            (self.carried[node],) = incoming.values()
            return None
        if query.is_call(node, ops.ADD, ops.SUB):
            return self._through_sum(node, incoming)
        if query.is_call(node, ops.CAT):
            return self._through_concatenation(node, incoming)
        if source_of(node) is None or len(incoming) > 1:
            return Reason.NONLINEAR_READER
        return self._carry(node, forward(self._graph, node, next(iter(incoming.values()))))

    def _carry(self, node: fx.Node, found: Affine | Reason) -> Reason | None:
        if isinstance(found, Reason):
            return found
        self.carried[node] = found
        return None

    def _into_linear(self, node: fx.Node, incoming: dict[fx.Node, Affine]) -> Reason | None:
        linear, found = read_linear_map(self._graph, node), incoming.get(node.args[0])  # type: ignore[arg-type]
        if linear is None or found is None or len(incoming) > 1:
            return Reason.NOT_CONSTANT
        if not found.is_uniform and found.axis != linear.input_axis:
            return Reason.AXIS
        self.changes.before[node] = found
        return None

    def _through_sum(self, node: fx.Node, incoming: dict[fx.Node, Affine]) -> Blocked | Reason | None:
        """(a x + c) + (a y + d) = a (x + y) + (c + d); what carries nothing is divided by a where it is made."""
        if node.kwargs or len(node.args) > 2:
            return Reason.NONLINEAR_READER
        operands: list[Any] = list(node.args)
        carried = [self._aligned(node, operand, incoming) for operand in operands]
        if any(isinstance(found, Reason) for found in carried):
            return Reason.AXIS
        given = [found for found in carried if isinstance(found, Affine)]
        first = given[0].spread()
        shifts = [found.shift for found in given]
        if len(given) == 2:
            if not _agree(given[0], given[1], scale_only=True):
                return Reason.UNNORMED_TOKENS
            sign = -1.0 if query.is_call(node, ops.SUB) else 1.0
            axis = given[1].axis if given[0].is_uniform else given[0].axis
            return self._carry(node, Affine(first.scale, shifts[0] + sign * shifts[1], axis).spread())
        index = 0 if carried[0] is None else 1
        if bool((first.scale != 1).any()):
            blocked = self._divide(node, operands[index], first.scaling())
            if blocked is not None:
                return blocked
        is_negative = query.is_call(node, ops.SUB) and index == 0
        shift = -first.shift if is_negative else first.shift
        return self._carry(node, Affine(first.scale, shift, first.axis))

    def _aligned(self, node: fx.Node, operand: Any, incoming: dict[fx.Node, Affine]) -> Affine | Reason | None:
        """Return what an operand of a sum carries, along the result's axis."""
        found = incoming.get(operand) if isinstance(operand, fx.Node) else None
        if found is None or found.is_uniform:
            return found
        axis = found.axis + query.rank(node) - query.rank(operand)
        same = query.shape(operand)[found.axis] == query.shape(node)[axis]
        return Affine(found.scale, found.shift, axis) if same else Reason.AXIS

    def _divide(self, node: fx.Node, operand: object, carried: Affine) -> Blocked | Reason | None:
        """Undo ``carried`` where ``operand`` is made, so that it carries it as the others do."""
        if not self._rescales:
            return Reason.STREAM_READER if query.is_call(node, ops.ADD, ops.SUB) else Reason.UNNORMED_TOKENS
        if bool((carried.scale == 0).any()):
            return Reason.ZERO_SCALE
        aligned = align(node, operand, carried.inverse())
        if aligned is None:
            return Reason.AXIS
        self.rescaled = True
        return push(self._graph, operand, aligned, node, self.changes)  # type: ignore[arg-type]

    def _through_concatenation(self, node: fx.Node, incoming: dict[fx.Node, Affine]) -> Blocked | Reason | None:
        axis = int(query.argument(node, 1, "dim", 0)) % query.rank(node)
        operands: list[fx.Node] = list(node.args[0])  # type: ignore[arg-type]
        given = [incoming.get(operand) for operand in operands]
        if all(found is None or found.is_uniform or found.axis == axis for found in given):
            if all(found is not None and found.is_uniform and _agree(found, given[0]) for found in given):
                return self._carry(node, given[0])  # type: ignore[arg-type]
            return self._carry(node, _joined(operands, given, axis))
        first = next(found for found in given if found is not None)
        for operand, found in zip(operands, given, strict=True):
            if found is not None:
                if not _agree(found, first):
                    return Reason.UNNORMED_TOKENS
            elif (blocked := self._divide(node, operand, first)) is not None:
                return blocked
        return self._carry(node, first)


def _agree(one: Affine, other: Affine | None, *, scale_only: bool = False) -> bool:
    if other is None or not (one.is_uniform or other.is_uniform or one.axis == other.axis):
        return False
    pairs = [(one.scale, other.scale)] + ([] if scale_only else [(one.shift, other.shift)])
    return all(bool((left == right).all()) for left, right in pairs)


def _joined(operands: list[fx.Node], given: list[Affine | None], axis: int) -> Affine | Reason:
    """Return the affine of a concatenation along the channels, the identity where an operand carries none."""
    scales, shifts = [], []
    for operand, found in zip(operands, given, strict=True):
        size = query.shape(operand)[axis]
        if not isinstance(size, int):
            return Reason.AXIS
        scales.append(torch.ones(size, dtype=torch.float64) if found is None else found.scale.expand(size))
        shifts.append(torch.zeros(size, dtype=torch.float64) if found is None else found.shift.expand(size))
    return Affine(torch.cat(scales), torch.cat(shifts), axis)
