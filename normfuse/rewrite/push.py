"""Backwards: an affine that a tensor should have is given to what makes the tensor."""

from __future__ import annotations

from torch import fx

from normfuse.graph import Graph, ops, query
from normfuse.graph.affine import AFFINE, Affine
from normfuse.report import Reason
from normfuse.rewrite.changes import Blocked, Changes, is_identity
from normfuse.rewrite.commuting import backward, forward, source_of
from normfuse.rewrite.linear_map import LINEAR_MAPS, read_linear_map

__all__ = ["push"]


def push(graph: Graph, node: fx.Node, wanted: Affine, reader: fx.Node, changes: Changes) -> Blocked | None:
    """Note in ``changes`` what makes ``node``, as ``reader`` reads it, ``wanted`` of what it is.

    Goes back through everything that commutes with the affine, through sums and concatenations, to linear maps,
    embedding tables, constants and other affines. Returns where and why it came to an end, or None; ``changes`` is
    then complete (else it is of no use).
    """
    if is_identity(wanted):
        return None
    if query.is_constant(node):
        return _blocked(node, changes.put_into_constant(reader, node, wanted))
    if _reads(reader, node) > 1 or not all(
        _is_unaffected(graph, other, wanted) for other in query.readers(node) if other is not reader
    ):
        return Blocked(node, Reason.SHARED)
    if query.is_call(node, *LINEAR_MAPS):
        return _into_linear(graph, node, wanted, changes)
    if query.is_call(node, AFFINE):
        return _blocked(node, changes.put_into_affine(graph, node, wanted))
    if query.is_call(node, ops.EMBEDDING):
        return _into_table(node, wanted, changes)
    if query.is_call(node, ops.ADD, ops.SUB):
        return _into_sum(graph, node, wanted, changes)
    if query.is_call(node, ops.CAT):
        return _into_concatenation(graph, node, wanted, changes)
    if query.is_call(node, ops.MATMUL):
        return _into_product(graph, node, wanted, changes)
    return _through(graph, node, wanted, changes)


def _blocked(node: fx.Node, reason: Reason | None) -> Blocked | None:
    return None if reason is None else Blocked(node, reason)


def _reads(reader: fx.Node, node: fx.Node) -> int:
    count = 0

    def seen(argument: fx.Node) -> fx.Node:
        nonlocal count
        count += argument is node
        return argument

    fx.map_arg((reader.args, reader.kwargs), seen)
    return count


def _is_unaffected(graph: Graph, reader: fx.Node, wanted: Affine) -> bool:
    """Return whether a reader takes only channels that keep the identity."""
    if query.is_call(reader, *ops.SPLITS, ops.ATEN.unbind.int):
        return all(_is_unaffected(graph, part, wanted) for part in query.readers(reader))
    if reader.op != "call_function" or source_of(reader) is None:
        return False
    seen = forward(graph, reader, wanted)
    return isinstance(seen, Affine) and is_identity(seen)


def _into_linear(graph: Graph, node: fx.Node, wanted: Affine, changes: Changes) -> Blocked | None:
    linear = read_linear_map(graph, node)
    if linear is None:
        return Blocked(node, Reason.NOT_CONSTANT)
    if not wanted.is_uniform and wanted.axis != linear.output_axis:
        return Blocked(node, Reason.AXIS)
    return _blocked(node, changes.put_behind(node, wanted))


def _into_table(node: fx.Node, wanted: Affine, changes: Changes) -> Blocked | None:
    if not query.is_constant(node.args[0]):
        return Blocked(node, Reason.NOT_CONSTANT)
    if not wanted.is_uniform and wanted.axis != query.rank(node) - 1:
        return Blocked(node, Reason.AXIS)
    along_rows = Affine(wanted.scale, wanted.shift, 0 if wanted.is_uniform else 1)
    return _blocked(node, changes.put_into_table(node, along_rows))


def _into_sum(graph: Graph, node: fx.Node, wanted: Affine, changes: Changes) -> Blocked | None:
    """a (x + y) + c = (a x + c) + a y."""
    if node.kwargs or len(node.args) > 2:
        return Blocked(node, Reason.NO_LINEAR)
    for operand, part in zip(node.args[:2], (wanted, wanted.scaling()), strict=True):
        aligned = align(node, operand, part)
        if aligned is None:
            return Blocked(node, Reason.AXIS)
        if (blocked := push(graph, operand, aligned, node, changes)) is not None:  # type: ignore[arg-type]
            return blocked
    return None


def align(node: fx.Node, operand: object, found: Affine) -> Affine | None:
    """Return an affine of a sum's result as one of an operand, or None where the operand is broadcast along it.

    Constants are widened when they change, so they keep the result's axis.
    """
    if not isinstance(operand, fx.Node) or not query.is_tensor(operand):
        return None
    if found.is_uniform or query.is_constant(operand):
        return found
    axis = found.axis - (query.rank(node) - query.rank(operand))
    if axis < 0 or query.shape(operand)[axis] != query.shape(node)[found.axis]:
        return None
    return Affine(found.scale, found.shift, axis)


def _into_concatenation(graph: Graph, node: fx.Node, wanted: Affine, changes: Changes) -> Blocked | None:
    axis = int(query.argument(node, 1, "dim", 0)) % query.rank(node)
    start = 0
    for operand in node.args[0]:  # type: ignore[union-attr]
        assert isinstance(operand, fx.Node)
        part = wanted
        if not wanted.is_uniform and wanted.axis == axis:
            stop = start + int(query.shape(operand)[axis])
            part = Affine(wanted.scale[start:stop], wanted.shift[start:stop], axis)
            start = stop
        if (blocked := push(graph, operand, part, node, changes)) is not None:
            return blocked
    return None


def _into_product(graph: Graph, node: fx.Node, wanted: Affine, changes: Changes) -> Blocked | None:
    """(x y) diag(a) = x (y diag(a)), diag(a) (x y) = (diag(a) x) y: a scale per channel of either factor."""
    left, right = node.args[:2]
    ranks = query.rank(left), query.rank(right)  # type: ignore[arg-type]
    if wanted.is_uniform or bool(wanted.shift.any()) or min(ranks) < 2:
        return Blocked(node, Reason.NO_LINEAR)
    behind = query.rank(node) - wanted.axis
    if behind > 2:  # heads: a factor may be broadcast along them
        return Blocked(node, Reason.AXIS)
    factor, rank = (right, ranks[1]) if behind == 1 else (left, ranks[0])
    return push(graph, factor, Affine(wanted.scale, wanted.shift, rank - behind), node, changes)  # type: ignore[arg-type]


def _through(graph: Graph, node: fx.Node, wanted: Affine, changes: Changes) -> Blocked | None:
    source = source_of(node) if node.op == "call_function" else None
    if source is None:
        return Blocked(node, Reason.MODEL_INPUT if node.op == "placeholder" else Reason.NO_LINEAR)
    found = backward(graph, node, wanted)
    if isinstance(found, Reason):
        return Blocked(node, found)
    reader = node.args[0] if query.is_call(node, ops.GETITEM) else node
    assert isinstance(reader, fx.Node)
    others = [part for part in query.readers(reader) if part is not node] if reader is not node else []
    if not all(_is_unaffected(graph, part, found) for part in others):
        return Blocked(node, Reason.SHARED)
    return push(graph, source, found, reader, changes)
