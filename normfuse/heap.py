"""Freed memory goes back to the system: what one step leaves in the heap's gaps is not held while the next one runs."""

from __future__ import annotations

import ctypes
import sys
from functools import cache
from typing import Any

__all__ = ["give_back_memory"]


def give_back_memory() -> None:
    """Return free pages to the system; where the C library has no such call (all but glibc), do nothing."""
    if (trim := _trim()) is not None:
        trim(0)


@cache
def _trim() -> Any:
    if not sys.platform.startswith("linux"):
        return None
    return getattr(ctypes.CDLL(None), "malloc_trim", None)
