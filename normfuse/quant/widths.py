"""The bits among which weights or activations may have theirs, and how that is written."""

from __future__ import annotations

from collections.abc import Sequence

from normfuse.errors import UsageError
from normfuse.quant.bits import FLOAT, LEAST, MOST

__all__ = ["parse_widths"]


def parse_widths(text: str, *, name: str) -> tuple[int, ...]:
    """Return the widths that a text lists, fewest first: ``"4,8"``; 16 and 32 both stand for float.

    Args:
        text: numbers divided by commas or blanks.
        name: the option, for the message.

    Raises:
        UsageError: one is no width.
    """
    words = text.replace(",", " ").split()
    widths = {FLOAT if word == "16" else int(word) for word in words if word.isascii() and word.isdigit()}
    if not words or not all(word.isascii() and word.isdigit() for word in words) or not _are_known(sorted(widths)):
        raise UsageError(
            f"{name} cannot be {text!r}",
            where="recipe",
            expected=f"numbers from {LEAST} to {MOST}, or 32 for float, as 4,8 or 2,3,4,8,32",
        )
    return tuple(sorted(widths))


def _are_known(widths: Sequence[int]) -> bool:
    return all(LEAST <= width <= MOST or width == FLOAT for width in widths)
