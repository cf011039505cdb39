"""Typed reading of a graph: shapes, constants, readers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from normfuse.graph.graph import Graph
from normfuse.graph.metadata import attribute, layer_of, source_line, value_of

__all__ = [
    "argument",
    "constant",
    "dtype",
    "is_call",
    "is_constant",
    "is_float",
    "is_tensor",
    "layer_of",
    "only_reader",
    "operand",
    "rank",
    "readers",
    "shape",
    "source_line",
]

Size = int | torch.SymInt


def is_call(node: object, *targets: object) -> bool:
    """Return whether ``node`` calls one of ``targets``."""
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target in targets


def is_constant(node: object) -> bool:
    """Return whether ``node`` is a constant tensor of the model."""
    return isinstance(node, fx.Node) and node.op == "get_attr"


def is_tensor(node: object) -> bool:
    """Return whether ``node`` is a node with one tensor as its value."""
    return isinstance(node, fx.Node) and isinstance(node.meta.get("val"), torch.Tensor)


def is_float(node: object) -> bool:
    """Return whether ``node`` makes one floating-point tensor."""
    return is_tensor(node) and dtype(node).is_floating_point  # type: ignore[arg-type]


def constant(graph: Graph, node: fx.Node) -> Tensor:
    """Return the data of a constant node."""
    return attribute(graph.module, str(node.target))


def argument(node: fx.Node, index: int, name: str, default: Any = None) -> Any:
    """Return an argument given by position or by keyword, or its default."""
    return node.args[index] if len(node.args) > index else node.kwargs.get(name, default)


def operand(node: fx.Node, index: int) -> fx.Node:
    """Return a positional argument that is a node; another is our bug."""
    found = node.args[index]
    assert isinstance(found, fx.Node)
    return found


def readers(node: fx.Node) -> list[fx.Node]:
    """Return the nodes that read ``node``, in graph order."""
    return sorted(node.users)  # users are kept in the order of rewrites


def only_reader(node: fx.Node) -> fx.Node | None:
    """Return the reader if there is exactly one (and it reads once), else None."""
    found = readers(node)
    return found[0] if len(found) == 1 and found[0].op != "output" else None


def shape(node: fx.Node) -> Sequence[Size]:
    """Return the shape; dynamic sizes are symbolic."""
    return tuple(value_of(node).shape)


def rank(node: fx.Node) -> int:
    """Return the number of axes."""
    return len(value_of(node).shape)


def dtype(node: fx.Node) -> torch.dtype:
    """Return the element type."""
    return value_of(node).dtype  # type: ignore[no-any-return]
