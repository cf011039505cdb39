"""The invariants of a graph, one function each; ``verify`` names the breaker."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final

import torch
from torch import fx

from normfuse.errors import InternalError
from normfuse.graph import metadata, ops, query
from normfuse.graph.graph import Graph
from normfuse.graph.text import render_node

__all__ = ["INVARIANTS", "verify"]

UPDATES_STATISTICS: Final = (
    ops.ATEN._native_batch_norm_legit_functional.default,
    ops.ATEN._batch_norm_with_update_functional.default,
)
"""The functional forms of batch norm in training; the others change their input and break the first invariant."""

Violation = tuple[fx.Node | None, str]


def verify(graph: Graph) -> None:
    """Check every invariant.

    Raises:
        InternalError: an invariant does not hold; the message names it and the node.
    """
    for name, invariant in INVARIANTS.items():
        for node, detail in invariant(graph):
            line = render_node(node).strip() if node is not None else ""
            raise InternalError(f"a graph is not {name}: {detail}", where=line)


def _functional(graph: Graph) -> Iterator[Violation]:
    for node in graph.nodes:
        if isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable:
            yield node, "the operator changes its input in place"


def _topological(graph: Graph) -> Iterator[Violation]:
    seen: set[fx.Node] = set()
    for node in graph.nodes:
        for argument in node.all_input_nodes:
            if argument not in seen:
                yield node, f"%{argument.name} is read before it is made"
        seen.add(node)


def _valued(graph: Graph) -> Iterator[Violation]:
    for node in graph.nodes:
        if node.op != "output" and not metadata.has_value(node):
            yield node, "the node has no fake value"


def _owned(graph: Graph) -> Iterator[Violation]:
    owners: dict[str, fx.Node] = {}
    buffers = dict(graph.module.named_buffers(remove_duplicate=False))
    for node in graph.nodes:
        if node.op != "get_attr":
            continue
        if str(node.target) not in buffers:
            yield node, "the constant does not exist"
            continue
        if str(node.target) in owners:
            yield node, "two nodes own the constant"
        owners[str(node.target)] = node
        tensor, value = buffers[str(node.target)], metadata.value_of(node)
        if tuple(tensor.shape) != tuple(value.shape) or tensor.dtype != value.dtype:
            yield node, f"the constant is {tensor.dtype}{list(tensor.shape)}, its node says otherwise"


def _in_eval_mode(graph: Graph) -> Iterator[Violation]:
    for node in graph.nodes:
        if query.is_call(node, *UPDATES_STATISTICS):
            yield node, "the operator computes batch statistics"
        if query.is_call(node, ops.DROPOUT, ops.ATEN.native_dropout.default) and query.argument(node, 2, "train"):
            yield node, "dropout is switched on"


def _named(graph: Graph) -> Iterator[Violation]:
    if len(graph.input_names) != len(graph.inputs):
        yield None, "the number of inputs changed"
    if len(graph.output_names) != len(graph.outputs):
        yield None, "the number of outputs changed"


INVARIANTS: Final[dict[str, Callable[[Graph], Iterator[Violation]]]] = {
    "functional": _functional,
    "in topological order": _topological,
    "fully valued": _valued,
    "the owner of its constants": _owned,
    "in eval mode": _in_eval_mode,
    "named as captured": _named,
}
"""What holds after every pass (docs/invariants.md)."""
