"""What a score has finished, for runs that are killed and started again; ``normfuse.checkpoint`` keeps it on disk."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final, Protocol

from normfuse.sensitivity.sensitivity import Tally

__all__ = ["FORGETFUL", "Keeper", "steps"]


class Keeper(Protocol):
    """Something that remembers what is plain data, by name."""

    def get(self, part: str) -> Any | None:
        """Return what was kept, None if nothing was."""
        ...

    def put(self, part: str, state: Any) -> None:
        """Keep plain data in the place of what was kept before."""
        ...


class _Forgetful:
    def get(self, part: str) -> Any | None:
        return None

    def put(self, part: str, state: Any) -> None:
        pass


FORGETFUL: Final[Keeper] = _Forgetful()
"""Keeps nothing."""


def steps(keeper: Keeper, part: str, tallies: Sequence[Tally], total: int) -> Iterator[tuple[int, bool]]:
    """Yield the numbers of all steps and whether each is done already; tallies are restored first, kept after each."""
    done = 0
    if (state := keeper.get(part)) is not None and len(state["tallies"]) == len(tallies):
        done = int(state["done"])
        for tally, kept in zip(tallies, state["tallies"], strict=True):
            tally.restore(kept)
    for at in range(total):
        yield at, at < done
        if at >= done:
            keeper.put(part, {"done": at + 1, "tallies": [tally.as_dict() for tally in tallies]})
