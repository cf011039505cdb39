"""Bits that the user gives to layers by name."""

from __future__ import annotations

import difflib
from collections.abc import Collection
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Final, Self

from normfuse.errors import UsageError
from normfuse.quant.bits import Bits

__all__ = ["Overrides"]

EXPECTED: Final = "a layer's name or a pattern with * or ?, =, and bits, as head=8 or blocks.*.fc2=w4a8"

SHOWN: Final = 4
"""Layers that a message names: enough to see how they are called."""


@dataclass(frozen=True, slots=True)
class Overrides:
    """Patterns of layers' names (as the user's modules are called, ``blocks.3.mlp.fc1``), each with bits.

    Patterns are the shell's: ``*`` stands for anything, points too. Of several that fit a layer the last counts.

    Raises:
        UsageError: a pattern is empty, or has the blanks or commas that divide words.
    """

    patterns: tuple[tuple[str, Bits], ...] = ()

    def __post_init__(self) -> None:
        for pattern, bits in self.patterns:
            if not pattern or pattern.replace(",", " ").split() != [pattern]:
                raise UsageError(f"overrides cannot have '{pattern}={bits}'", where="recipe", expected=EXPECTED)

    @classmethod
    def parse(cls, text: str) -> Self:
        """Return what words say, divided by blanks or commas: ``"head=8 blocks.*.fc2=w4a8 patch_embed=32"``.

        Raises:
            UsageError: a word is no pattern with bits.
        """
        return cls(tuple(_parsed(word) for word in text.replace(",", " ").split()))

    def bits_for(self, layer: str) -> Bits | None:
        """Return the bits of the last pattern that fits a layer, or None: it is not overridden."""
        return next((bits for pattern, bits in reversed(self.patterns) if fnmatchcase(layer, pattern)), None)

    def unused(self, layers: Collection[str]) -> list[str]:
        """Return the patterns that fit no layer."""
        return [pattern for pattern, _ in self.patterns if not _fits_any(pattern, layers)]

    def refuse_unused(self, layers: Collection[str]) -> None:
        """Refuse patterns that fit no layer, which are misspelled.

        Raises:
            UsageError: there is one; the message has the name or the pattern that is nearest to it.
        """
        for pattern in self.unused(layers):
            close = _close(pattern, layers)
            raise UsageError(
                f"overrides cannot have {pattern}: no layer that can have bits is called so",
                where="recipe",
                expected=f"names such as {', '.join(sorted(layers)[:SHOWN])}"
                if layers
                else "no overrides: no layer has bits",
                hint=f"did you mean {close}?" if close else "",
            )

    def __str__(self) -> str:
        return " ".join(f"{pattern}={bits}" for pattern, bits in self.patterns)


def _parsed(word: str) -> tuple[str, Bits]:
    pattern, equals, written = word.rpartition("=")
    if not equals:
        raise UsageError(f"overrides cannot have {word!r}", where="recipe", expected=EXPECTED)
    try:
        return pattern, Bits.parse(written)
    except UsageError as error:
        raise UsageError(f"overrides cannot have {word!r}", where="recipe", expected=error.expected) from error


def _fits_any(pattern: str, layers: Collection[str]) -> bool:
    return any(fnmatchcase(layer, pattern) for layer in layers)


def _close(pattern: str, layers: Collection[str]) -> str | None:
    """Return the pattern in longer names if there are such, or else the name that is nearest to it, if one is near."""
    longer = (wider for wider in (f"*.{pattern}", f"{pattern}.*", f"*{pattern}*") if _fits_any(wider, layers))
    return next(longer, None) or next(iter(difflib.get_close_matches(pattern, layers, n=1)), None)
