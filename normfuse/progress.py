"""How long work tells how far it is; the command line draws it, everything else stays silent."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

__all__ = ["Advance", "Progress", "Silent"]

Advance = Callable[[int], None]
"""Call it with the number of steps that were just done."""


class Progress(Protocol):
    """Something that shows tasks and how much of each is done."""

    def task(self, label: str, total: int | None = None) -> AbstractContextManager[Advance]:
        """Show a task until the context ends; ``total`` None means that its length is unknown."""
        ...


class Silent:
    """Shows nothing."""

    @contextmanager
    def task(self, label: str, total: int | None = None) -> Iterator[Advance]:
        """Accept the task and its steps without a word."""
        yield lambda steps: None
