"""A multiple-choice knapsack: one option of every unit, what that sums up to, and which options nobody would pick."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Final, Self

import numpy as np
from numpy.typing import NDArray

from normfuse.quant.bits import Bits

__all__ = ["SLACK", "Floats", "Knapsack", "Picks", "Unit", "exceeds", "resources_of"]

Floats = NDArray[np.float64]
Picks = list[int]
"""Options, one of every unit."""

SLACK: Final = 4 * sys.float_info.epsilon
"""What part of itself a limit may be exceeded by: it, the amounts and their sum are each rounded, by half an ulp."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """A layer, or several that must have the same bits.

    ``damage`` is the predicted loss of every option, ``use`` what it takes of every resource. Units with the same
    ``tie`` get the same activation bits.
    """

    name: str
    damage: Mapping[Bits, float]
    use: Mapping[Bits, Mapping[str, float]]
    tie: str | None = None


def resources_of(units: Sequence[Unit]) -> Set[str]:
    """Return the names of what the first option uses: all use the same."""
    return next((use.keys() for unit in units for use in unit.use.values()), set())


def exceeds(amount: float, limit: float) -> bool:
    """Return whether an amount is over a limit by more than rounding."""
    return bool(amount > limit * (1 + SLACK))


@dataclass(frozen=True, slots=True, kw_only=True)
class Knapsack:
    """All options worth a thought, with the places of their units, damage, and a line per limit of use relative to it.

    ``ties`` holds every tie's activation bits, of each the tied units, of each the options that have them; units
    without a tie are alone in one.
    """

    units: Sequence[Unit]
    limits: Mapping[str, float]
    options: Sequence[tuple[int, Bits]]
    damage: Floats
    use: Floats
    ties: Sequence[Sequence[Sequence[Picks]]]

    @classmethod
    def of(cls, units: Sequence[Unit], limits: Mapping[str, float]) -> Self:
        """Return the problem without the options that others beat."""
        options: list[tuple[int, Bits]] = []
        ties: list[list[list[Picks]]] = []
        for members in _members(units):
            ties.append([])
            for block in _unbeaten([units[index] for index in members], list(limits)):
                ties[-1].append([])
                for index, kept in zip(members, block, strict=True):
                    ties[-1][-1].append([*range(len(options), len(options) + len(kept))])
                    options += [(index, bits) for bits in kept]
        use = [[units[index].use[bits][name] / limit for index, bits in options] for name, limit in limits.items()]
        return cls(
            units=units,
            limits=limits,
            options=options,
            damage=np.array([units[index].damage[bits] for index, bits in options], dtype=np.float64),
            use=np.array(use, dtype=np.float64).reshape(len(limits), len(options)),
            ties=ties,
        )

    def cheapest(self, cost: Floats) -> Picks:
        """Return the options with the least sum of costs, whatever the limits."""
        costs = cost.tolist()
        found: Picks = []
        for tie in self.ties:
            blocks = ([min(row, key=costs.__getitem__) for row in block] for block in tie)
            found += min(blocks, key=lambda picks: math.fsum(costs[pick] for pick in picks))
        return found

    def amount(self, picks: Picks, resource: str) -> float:
        """Return the sum of a resource, exact but for one rounding."""
        chosen = (self.options[pick] for pick in picks)
        return math.fsum(self.units[index].use[bits][resource] for index, bits in chosen)

    def loss(self, picks: Picks) -> float:
        """Return the sum of damage, exact but for one rounding."""
        return math.fsum(self.damage[picks])

    def keeps(self, picks: Picks) -> bool:
        """Return whether every limit holds."""
        return not any(exceeds(self.amount(picks, name), limit) for name, limit in self.limits.items())


def _members(units: Sequence[Unit]) -> list[list[int]]:
    """Return the places of tied units, tie by tie."""
    found: dict[tuple[bool, str], list[int]] = {}
    for index, unit in enumerate(units):
        found.setdefault((unit.tie is None, unit.name if unit.tie is None else unit.tie), []).append(index)
    return [*found.values()]


def _unbeaten(tied: Sequence[Unit], limits: Sequence[str]) -> list[list[list[Bits]]]:
    """Return, for all activation bits that tied units can have, the options of each that no others beat.

    A unit alone can have any of its options instead, a tied one those with the same activation bits; and activation
    bits are left out if there are others at which every tied unit has something better.
    """
    beaters = [_beaters(unit, limits) for unit in tied]
    shared = sorted(set.intersection(*({bits.activation for bits in unit.damage} for unit in tied)))
    if not shared:
        raise ValueError(f"{', '.join(unit.name for unit in tied)} are tied and have no activation bits in common")

    def is_left(bits: Bits, better: Sequence[Bits]) -> bool:
        return not any(len(tied) == 1 or each.activation == bits.activation for each in better)

    left = {
        activation: [
            [bits for bits in each if bits.activation == activation and is_left(bits, each[bits])] for each in beaters
        ]
        for activation in shared
    }

    def is_beaten(activation: int, other: int) -> bool:
        better = [each[bits] for each, options in zip(beaters, left[activation], strict=True) for bits in options]
        return all(any(bits.activation == other for bits in options) for options in better)

    return [
        left[activation]
        for activation in shared
        if not any(is_beaten(activation, other) for other in shared if other != activation)
    ]


def _beaters(unit: Unit, limits: Sequence[str]) -> dict[Bits, list[Bits]]:
    """Return, for every option, those with no more damage and no more use of what is limited.

    Of options that are equal in that, the one that uses least of everything beats the others.
    """
    most = {name: max(use[name] for use in unit.use.values()) or 1.0 for name in resources_of([unit])}
    options = sorted(unit.damage, key=lambda bits: sum(unit.use[bits][name] / most[name] for name in most))
    values = np.array([[unit.damage[bits], *(unit.use[bits][name] for name in limits)] for bits in options])
    is_no_worse = (values[:, None] <= values[None]).all(axis=-1)
    beats = is_no_worse & (~is_no_worse.T | np.triu(np.ones_like(is_no_worse), k=1))
    return {bits: [options[better] for better in np.flatnonzero(beats[:, place])] for place, bits in enumerate(options)}
