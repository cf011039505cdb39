"""Views that move tokens and leave them whole: their factors move along."""

from __future__ import annotations

from typing import Any

from torch import fx

from normfuse.graph import ops, query
from normfuse.integer.roles import is_view, viewed

__all__ = ["moved_factors"]


def moved_factors(view: fx.Node) -> tuple[Any, ...] | None:
    """Return the arguments, behind the first, with which a view moves factors as it does tokens.

    None if it is no such view: the channels have to be its last axis before and behind.
    """
    if not is_view(view) or not query.is_tensor(view):
        return None
    channels = query.shape(view)[-1]
    if not isinstance(channels, int) or query.shape(viewed(view))[-1] != channels:
        return None
    given: Any = view.args[1:]
    if query.is_call(view, ops.CLONE, ops.DROPOUT):
        return tuple(given)
    if query.is_call(view, ops.RESHAPE):
        *others, last = given[0]
        return ([*others, 1],) if last == channels else None
    rank, behind = query.rank(viewed(view)), query.rank(view)
    keeps_channels = (
        (query.is_call(view, ops.PERMUTE) and given[0][-1] % rank == rank - 1)
        or (query.is_call(view, ops.SELECT, ops.SLICE) and bool(given) and given[0] % rank != rank - 1)
        or (query.is_call(view, ops.UNSQUEEZE) and given[0] % behind != behind - 1)
        or (query.is_call(view, ops.ROLL) and len(given) > 1 and all(axis % rank != rank - 1 for axis in given[1]))
    )
    return tuple(given) if keeps_channels else None
