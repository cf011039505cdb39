"""What every linear map of a network takes at every choice of bits, as a table; kept as JSON, read back only whole."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from typing import Any, Final, Self, TypeVar

from normfuse.errors import BadInput, UsageError
from normfuse.quant.bits import Bits

__all__ = ["Conditions", "LatencyTable"]

T = TypeVar("T")

FORMAT: Final = "normfuse layer latencies"

SHORTEST: Final = 1e-9
"""Seconds: the clock's step. What takes less was not measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Conditions:
    """What latencies hold for: the processor, onnxruntime's version and threads, the samples of one run."""

    processor: str
    instruction_set: str
    onnxruntime: str
    threads: int
    batch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LatencyTable:
    """Measured seconds of one run, by the name of the linear map's node and its bits.

    In it are the maps that are to be quantized. The rest of a network (norms, attention, sums, maps that stay float)
    is not, and every figure has one call of onnxruntime in it. So a caller measures one whole engine and takes its
    maps' seconds away: what is left, plus the maps' seconds at other bits, is the estimate for these. The calls cancel
    out, and what is left of a small network may be below zero.

    Maps that share something are measured as if they did not: a quantizer that several read behind counts in each, and
    convolutions in a row change layout and codes between them. Weights are in the caches, as they seldom are in large
    networks.

    Attributes:
        seconds: by map, in graph order, and bits.
        missing: by map and bits, why there is no figure.
        measured_on: what the figures hold for.
        spread: the largest deviation of any round from the median of its rounds, relative to it.
    """

    seconds: Mapping[str, Mapping[Bits, float]]
    missing: Mapping[str, Mapping[Bits, str]] = field(default_factory=dict)
    measured_on: Conditions
    spread: float

    def as_dict(self) -> dict[str, object]:
        """Return the table for JSON."""
        return {
            "format": FORMAT,
            "measured_on": asdict(self.measured_on),
            "spread": self.spread,
            "seconds": {name: {str(bits): value for bits, value in row.items()} for name, row in self.seconds.items()},
            "missing": {name: {str(bits): why for bits, why in row.items()} for name, row in self.missing.items()},
        }

    @classmethod
    def from_dict(cls, value: object, *, where: str = "") -> Self:
        """Return the table that ``as_dict`` was called on.

        Args:
            value: what was read from JSON, by whomever it was written.
            where: how messages call it, a file for example.

        Raises:
            BadInput: it is no such table; the message names the entry.
        """
        try:
            found = _entries(value, "the table", ("format", *(each.name for each in fields(cls))))
            if found["format"] != FORMAT:
                raise _Wrong(f"its format is {found['format']!r}")
            conditions = _entries(found["measured_on"], "measured_on", [each.name for each in fields(Conditions)])
            return cls(
                seconds=_rows(found["seconds"], "seconds", partial(_number, least=SHORTEST)),
                missing=_rows(found["missing"], "missing", _text),
                measured_on=Conditions(
                    processor=_text(conditions["processor"], "processor"),
                    instruction_set=_text(conditions["instruction_set"], "instruction_set"),
                    onnxruntime=_text(conditions["onnxruntime"], "onnxruntime"),
                    threads=_count(conditions["threads"], "threads"),
                    batch=_count(conditions["batch"], "batch"),
                ),
                spread=_number(found["spread"], "spread"),
            )
        except _Wrong as error:
            raise BadInput(
                f"this is no table of latencies: {error}",
                where=where,
                expected="what LatencyTable.as_dict returned",
                hint="measure again, on the machine that the engine is for",
            ) from error


class _Wrong(Exception):
    """An entry is not what ``LatencyTable.as_dict`` writes."""


def _entries(value: object, name: str, wanted: Sequence[str]) -> dict[str, Any]:
    found = _named(value, name)
    if lacking := [each for each in wanted if each not in found]:
        raise _Wrong(f"{name} lacks {lacking[0]!r}")
    if unknown := [each for each in found if each not in wanted]:
        raise _Wrong(f"{name} has an unknown {unknown[0]!r}")
    return found


def _rows(value: object, name: str, read: Callable[[object, str], T]) -> dict[str, dict[Bits, T]]:
    return {
        each: {_bits(label): read(entry, f"{name} of {each} at {label}") for label, entry in _named(row, each).items()}
        for each, row in _named(value, name).items()
    }


def _named(value: object, name: str) -> dict[str, Any]:
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return value
    raise _Wrong(f"{name} is no object")


def _bits(label: str) -> Bits:
    try:
        bits = Bits.parse(label)
    except UsageError as error:
        raise _Wrong(error.what) from error
    if str(bits) != label:  # two spellings of one choice could say two things
        raise _Wrong(f"bits are written {label!r}, not {str(bits)!r}")
    return bits


def _text(value: object, name: str) -> str:
    if not isinstance(value, str):
        raise _Wrong(f"{name} is {value!r}, no text")
    return value


def _number(value: object, name: str, *, least: float = 0.0) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not least <= value <= sys.float_info.max:
        raise _Wrong(f"{name} is {value!r}, no number from {least:g}")
    return float(value)


def _count(value: object, name: str) -> int:
    if not isinstance(value, int):
        raise _Wrong(f"{name} is {value!r}, no count")
    return int(_number(value, name, least=1))
