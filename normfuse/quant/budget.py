"""What a compiled model may take, as ``--budget`` says it."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from enum import Enum
from itertools import pairwise
from typing import Final, Self

from normfuse.errors import UsageError

__all__ = ["Budget", "Limit", "Resource"]

LEAST_BITS, MOST_BITS = 2, 32

NUMBER: Final = re.compile(r"(\d+\.?\d*|\.\d+)([eE][+-]?\d{1,3})?")


class Resource(Enum):
    """What a budget can limit; the value is what recipes and the command line write."""

    BYTES = "bytes"
    AVERAGE_BITS = "avg-bits"
    BOPS = "bops"
    ACTIVATION_BYTES = "activation-bytes"
    LATENCY = "latency"
    DROP = "drop"


@dataclass(frozen=True, slots=True)
class _Form:
    """How amounts of a resource are written: examples, units, and whether a part of the float model's is one."""

    expected: str
    units: Mapping[str, Decimal]
    has_parts: bool = True


SIZES: Final = {
    **{unit: Decimal(1000) ** power for power, unit in enumerate(("", "kB", "MB", "GB"))},
    **{unit: Decimal(1024) ** power for power, unit in enumerate(("KiB", "MiB", "GiB"), start=1)},
}
COUNTS: Final = {unit: Decimal(1000) ** power for power, unit in enumerate(("", "k", "M", "G", "T"))}
TIMES: Final = {unit: Decimal(1000) ** -power for power, unit in enumerate(("s", "ms", "us"))}
NUMBERS: Final = {"": Decimal(1)}

FORMS: Final = {
    Resource.BYTES: _Form(
        "0.14x (of the float model), 3.5MB (kB, MB, GB, KiB, MiB or GiB) or a number of bytes", SIZES
    ),
    Resource.AVERAGE_BITS: _Form(f"{LEAST_BITS} to {MOST_BITS} bits per weight, as 4.5", NUMBERS, has_parts=False),
    Resource.BOPS: _Form("0.1x (of the float model), 12G (k, M, G or T) or a number of bit operations", COUNTS),
    Resource.ACTIVATION_BYTES: _Form(
        "0.5x (of the float model), 2MB (kB, MB, GB, KiB, MiB or GiB) or a number of bytes", SIZES
    ),
    Resource.LATENCY: _Form("0.8x (of the float model) or 2.5ms (s, ms or us)", TIMES),
    Resource.DROP: _Form("points of the score, as 0.5", NUMBERS, has_parts=False),
}


@dataclass(frozen=True, slots=True)
class Limit:
    """The largest amount of a resource, or (relative) which part of the float model's it is at most.

    Sizes are in bytes, times in seconds, drops in points.

    Raises:
        UsageError: no model can have that amount, or parts of the resource mean nothing.
    """

    resource: Resource
    amount: float
    is_relative: bool = False

    def __post_init__(self) -> None:
        is_possible = 0 < self.amount < math.inf
        if self.resource is Resource.AVERAGE_BITS:
            is_possible = LEAST_BITS <= self.amount <= MOST_BITS
        if not is_possible or (self.is_relative and not FORMS[self.resource].has_parts):
            raise _refusal(self.resource, f"{self.amount}{'x' * self.is_relative}")

    @classmethod
    def parse(cls, word: str) -> Self:
        """Return the limit that a word such as ``bytes=3.5MB`` says.

        Raises:
            UsageError: it says none; the message says what would.
        """
        name, _, written = word.partition("=")
        resource = next((resource for resource in Resource if resource.value == name), None)
        if resource is None:
            close = difflib.get_close_matches(name, [resource.value for resource in Resource], n=1)
            raise UsageError(
                f"the budget cannot have {word!r}",
                where="recipe",
                expected=f"{', '.join(resource.value for resource in Resource)}, each with = and an amount",
                hint=f"did you mean {close[0]}={written}?" if close else "",
            )
        found, units = NUMBER.match(written), FORMS[resource].units
        unit = written[found.end() :] if found else ""
        if found and unit == "x":
            return cls(resource, float(found.group()), is_relative=True)
        if found and unit in units:
            return cls(resource, float(Decimal(found.group()) * units[unit]))
        meant = next((each for each in (*units, "x") if each.lower() == unit.lower()), unit)
        raise _refusal(resource, written, meant=f"{found.group()}{meant}" if found and meant != unit else "")

    def __str__(self) -> str:
        # Powers of ten only move the point of the shortest decimal that is read as this amount: nothing is rounded.
        amount = Decimal(repr(float(self.amount)))
        if self.is_relative:
            return f"{self.resource.value}={_plain(amount)}x"
        units = {unit: factor for unit, factor in FORMS[self.resource].units.items() if "i" not in unit}
        unit = max(
            (unit for unit in units if units[unit] <= amount),
            key=units.__getitem__,
            default=min(units, key=units.__getitem__),
        )
        return f"{self.resource.value}={_plain(amount / units[unit])}{unit}"


@dataclass(frozen=True, slots=True)
class Budget:
    """Limits of different resources, in the order of ``Resource``; a model has to keep them all.

    Raises:
        UsageError: a resource is limited twice.
    """

    limits: tuple[Limit, ...] = ()

    def __post_init__(self) -> None:
        order = list(Resource)
        object.__setattr__(self, "limits", tuple(sorted(self.limits, key=lambda limit: order.index(limit.resource))))
        for one, other in pairwise(self.limits):
            if one.resource is other.resource:
                raise UsageError(
                    f"the budget limits {one.resource.value} twice",
                    where="recipe",
                    expected=f"one of {one} and {other}",
                )

    @classmethod
    def parse(cls, text: str) -> Self:
        """Return the budget that words say, divided by blanks or commas: ``"bytes=0.14x latency=2.5ms"``.

        Raises:
            UsageError: a word is no limit, or limits what another does.
        """
        return cls(tuple(Limit.parse(word) for word in text.replace(",", " ").split()))

    def __str__(self) -> str:
        return " ".join(str(limit) for limit in self.limits)


def _refusal(resource: Resource, written: str, *, meant: str = "") -> UsageError:
    return UsageError(
        f"the budget cannot have {resource.value}={written}",
        where="recipe",
        expected=FORMS[resource].expected,
        hint=f"did you mean {resource.value}={meant}?" if meant else "",
    )


def _plain(number: Decimal) -> str:
    """Return a number without needless zeros, and without an exponent unless it is far from 1."""
    number = number.normalize()
    return f"{number:f}" if Decimal("1e-6") <= number < Decimal("1e16") else str(number)
