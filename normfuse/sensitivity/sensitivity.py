"""What every width of every weight and activation is expected to cost: the result of a score."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from types import MappingProxyType
from typing import Any, Self

__all__ = ["Kind", "Sensitivity", "Tally"]


class Kind(Enum):
    """What can have bits of its own; the value is what files write."""

    WEIGHT = "weight"
    ACTIVATION = "activation"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sensitivity:
    """Expected damage, in any unit, of one part at some bits while the rest is float; damages of parts add up.

    Attributes:
        method: the score's name.
        weights: by the name of the linear map and bits.
        activations: by the name of the tensor's node and bits.
        facts: what the score says about itself.
    """

    method: str
    weights: Mapping[str, Mapping[int, float]]
    activations: Mapping[str, Mapping[int, float]]
    facts: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))

    def as_dict(self) -> dict[str, Any]:
        """Return the tables for JSON; ``from_dict`` reads them."""
        tables = {"weights": _for_json(self.weights), "activations": _for_json(self.activations)}
        return {"method": self.method, "facts": dict(self.facts), **tables}

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> Self:
        """Return what ``as_dict`` wrote."""
        tables = {name: _from_json(found[name]) for name in ("weights", "activations")}
        return cls(method=found["method"], facts=dict(found["facts"]), **tables)

    def of(self, kind: Kind) -> Mapping[str, Mapping[int, float]]:
        """Return one of the two tables."""
        return self.weights if kind is Kind.WEIGHT else self.activations


def _for_json(table: Mapping[str, Mapping[int, float]]) -> dict[str, dict[str, float]]:
    return {name: {str(bits): amount for bits, amount in row.items()} for name, row in table.items()}


def _from_json(table: Mapping[str, Mapping[str, float]]) -> dict[str, dict[int, float]]:
    return {name: {int(bits): float(amount) for bits, amount in row.items()} for name, row in table.items()}


class Tally:
    """Adds up damages, part by part."""

    def __init__(self) -> None:
        self._sums: dict[Kind, dict[str, dict[int, float]]] = {kind: defaultdict(dict) for kind in Kind}

    def add(self, kind: Kind, name: str, bits: int, amount: float) -> None:
        """Add to one part at one width."""
        row = self._sums[kind][name]
        row[bits] = row.get(bits, 0.0) + amount

    def as_dict(self) -> dict[str, dict[str, dict[str, float]]]:
        """Return the sums for JSON."""
        return {kind.value: _for_json(self._sums[kind]) for kind in Kind}

    def restore(self, kept: Mapping[str, Mapping[str, Mapping[str, float]]]) -> None:
        """Be again what ``as_dict`` was of."""
        self._sums = {kind: defaultdict(dict, _from_json(kept[kind.value])) for kind in Kind}

    def of(self, kind: Kind) -> dict[str, dict[int, float]]:
        """Return the sums of one kind."""
        return dict(self._sums[kind])

    def sensitivity(self, method: str, **facts: float) -> Sensitivity:
        """Return the sums as a score's result; what came out below 0 is 0."""
        weights, activations = (
            {name: {bits: max(sum_, 0.0) for bits, sum_ in row.items()} for name, row in self._sums[kind].items()}
            for kind in Kind
        )
        return Sensitivity(method=method, weights=weights, activations=activations, facts=facts)
