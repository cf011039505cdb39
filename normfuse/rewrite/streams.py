"""What the passes over a whole residual stream share: what they note of it, and how its views read it."""

from __future__ import annotations

from typing import Any, Final

from torch import fx

from normfuse.graph import ops, query
from normfuse.rewrite.commuting import source_of

__all__ = ["CENTRED", "CRMS_NORM", "caller", "pads_with_number", "works_along"]

CENTRED: Final = "centred"
"""Noted of everything that was centred, with the axis: a channel sum tells no more once it is rounded."""
CRMS_NORM: Final = "crms_norm"
"""Noted of the last operator of every norm over one channel less, so that it can be counted."""

_AXES: Final[dict[Any, int]] = {ops.SLICE: 1, ops.INDEX_SELECT: 1, **dict.fromkeys(ops.SPLITS, 2), ops.ROLL: 2}
"""The argument that says along which axes an operator works that may leave every channel in its place."""


def caller(node: fx.Node) -> fx.Node:
    """Return the node that reads what ``node`` is made of: itself, or the split that it is a part of."""
    return node.args[0] if query.is_call(node, ops.GETITEM) else node  # type: ignore[return-value]


def pads_with_number(node: fx.Node) -> bool:
    """Return whether the node pads with another constant than zero."""
    is_constant = query.argument(node, 2, "mode", "constant") == "constant"
    return query.is_call(node, ops.PAD) and is_constant and bool(query.argument(node, 3, "value"))


def works_along(node: fx.Node) -> list[int]:
    """Return the axes that an operator cuts or turns: with one channel less it would do so elsewhere."""
    reader = caller(node)
    if reader.target not in _AXES:
        return []
    given = query.argument(reader, _AXES[reader.target], "dims" if reader.target is ops.ROLL else "dim", 0)
    rank = query.rank(source_of(node))  # type: ignore[arg-type]
    return [int(axis) % rank for axis in (given if isinstance(given, (list, tuple)) else [given])]
