"""Bits for every unit under budgets, by least predicted damage: a multiple-choice knapsack, solved by HiGHS."""

from __future__ import annotations

import ctypes
import math
import os
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain, pairwise
from pathlib import Path
from typing import Final, Self

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import milp  # type: ignore[attr-defined]  # it has no types
from scipy.sparse import csr_array

from normfuse.errors import UsageError
from normfuse.quant.bits import Bits

__all__ = ["Allocation", "BudgetTooSmall", "Unit", "allocate", "front"]

Floats = NDArray[np.float64]
Picks = list[int]
"""Options, one of every unit."""

SLACK: Final = 4 * sys.float_info.epsilon
"""What part of itself a limit may be exceeded by: it, the amounts and their sum are each rounded, by half an ulp."""

ROWS: Final = 2.0**20
"""What a limit is in the solver's units: its absolute tolerance, 1e-6, is then 1e-12 of it."""

COSTS: Final = 1000.0
"""What the best known damage above the floor is there: the solver stops when 1e-9 of it is left to gain."""

PRICES, STEPS = (-80.0, 60.0), 30
"""Exponents (of 2) of prices beside the largest damage, and how often that range is halved."""

ROUNDS: Final = 20
"""Programs solved at most: mostly one; one more after an answer over a limit, or far better than the start."""

NODES: Final = 20_000
"""Nodes searched at most in each, some minutes. Counted, not timed, so that every machine finds the same bits."""

OUTPUT: Final = threading.Lock()
"""Held while standard output is exchanged, so that two threads put it back in order."""


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Allocation:
    """Bits by the units' names, and what they sum up to.

    ``gap`` is the part of the damage that is not proven to be needed: rounding, unless the search was cut short.
    """

    bits: Mapping[str, Bits]
    damage: float
    use: Mapping[str, float]
    gap: float = 0.0


class BudgetTooSmall(UsageError):
    """No bits keep the limits.

    Attributes:
        which: the resources whose limits cannot be met each alone, or else all limited ones.
        least: the least amount of each alone, or else the amounts where the largest relative overshoot is least.
    """

    def __init__(self, limits: Mapping[str, float], least: Mapping[str, float], *, is_joint: bool = False) -> None:
        self.which = tuple(least)
        self.least = least
        what = _joint_shortage(limits, least) if is_joint else _shortages(limits, least)
        super().__init__(what, where="recipe", hint="a larger budget, or fewer bits for more layers")


def allocate(units: Sequence[Unit], limits: Mapping[str, float]) -> Allocation:
    """Return the bits of least damage that keep every limit.

    Where options of a unit (or activation bits of a tie) have the same damage, those are taken that use less.

    Raises:
        BudgetTooSmall: no bits keep the limits; the error says by how much.
        ValueError: units or limits make no sense; that is our bug.
    """
    _check(units, limits)
    problem = _Problem.of(units, limits)
    least = {name: problem.amount(problem.cheapest(use), name) for name, use in zip(limits, problem.use, strict=True)}
    if short := {name: amount for name, amount in least.items() if _exceeds(amount, limits[name])}:
        raise BudgetTooSmall(limits, short)
    best = problem.cheapest(problem.damage)
    if problem.keeps(best):
        return problem.allocation(best, bound=problem.loss(best))
    return _searched(problem, _priced(problem) or _nearest(problem))


def front(
    units: Sequence[Unit], resource: str, limits: Mapping[str, float] | None = None, *, points: int
) -> list[Allocation]:
    """Return the best allocations from the least to the most useful amount of a resource, by that amount.

    They are what ``allocate`` finds for ``points`` limits, evenly spaced; none is as bad as another in both the
    amount and the damage.

    Raises:
        BudgetTooSmall: no bits keep the other limits.
        ValueError: units or limits make no sense, or there are fewer than two points; that is our bug.
    """
    if points < 2:
        raise ValueError(f"a front has two points or more, not {points}")
    limits = limits or {}
    _check(units, {resource: 1.0, **limits})
    frugal = [replace(unit, damage={bits: use[resource] for bits, use in unit.use.items()}) for unit in units]
    least = allocate(frugal, limits).use[resource]
    largest = math.fsum(max(use[resource] for use in unit.use.values()) for unit in units)
    most = allocate(units, {resource: largest or 1.0, **limits}).use[resource]
    amounts = {least + (most - least) * step / (points - 1) for step in range(points)}
    found = [allocate(units, {**limits, resource: amount}) for amount in amounts if amount > 0]
    best: list[Allocation] = []
    for each in sorted(found, key=lambda each: (each.use[resource], each.damage)):
        if not best or each.damage < best[-1].damage:
            best.append(each)
    return best


def _check(units: Sequence[Unit], limits: Mapping[str, float]) -> None:
    resources = _resources(units)
    if len({unit.name for unit in units}) < len(units):
        raise ValueError("two units have the same name")
    for unit in units:
        if not unit.damage or unit.damage.keys() != unit.use.keys():
            raise ValueError(f"{unit.name} needs options, and damage and use of each")
        for bits, damage in unit.damage.items():
            if unit.use[bits].keys() != resources:
                raise ValueError(f"{unit.name} at {bits} uses {[*unit.use[bits]]}, another option {[*resources]}")
            if not all(0 <= value < math.inf for value in (damage, *unit.use[bits].values())):
                raise ValueError(f"{unit.name} at {bits} cannot have damage {damage} and use {unit.use[bits]}")
    for name, limit in limits.items():
        if name not in resources or not 0 < limit < math.inf:
            raise ValueError(f"{name} cannot be limited to {limit}; in use are {[*resources]}")


def _resources(units: Sequence[Unit]) -> Set[str]:
    return next((use.keys() for unit in units for use in unit.use.values()), set())


def _exceeds(amount: float, limit: float) -> bool:
    return bool(amount > limit * (1 + SLACK))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Problem:
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
        return not any(_exceeds(self.amount(picks, name), limit) for name, limit in self.limits.items())

    def allocation(self, picks: Picks, *, bound: float) -> Allocation:
        """Return the picked bits; none that keep the limits have less damage than ``bound``."""
        damage, bits = self.loss(picks), dict(self.options[pick] for pick in picks)
        return Allocation(
            bits={unit.name: bits[index] for index, unit in enumerate(self.units)},
            damage=damage,
            use={name: self.amount(picks, name) for name in _resources(self.units)},
            gap=max(0.0, 1 - bound / damage) if damage else 0.0,
        )


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
    most = {name: max(use[name] for use in unit.use.values()) or 1.0 for name in _resources([unit])}
    options = sorted(unit.damage, key=lambda bits: sum(unit.use[bits][name] / most[name] for name in most))
    values = np.array([[unit.damage[bits], *(unit.use[bits][name] for name in limits)] for bits in options])
    is_no_worse = (values[:, None] <= values[None]).all(axis=-1)
    beats = is_no_worse & (~is_no_worse.T | np.triu(np.ones_like(is_no_worse), k=1))
    return {bits: [options[better] for better in np.flatnonzero(beats[:, place])] for place, bits in enumerate(options)}


def _priced(problem: _Problem) -> Picks | None:
    """Return the best that a price leads to, one for the relative use of all that is limited; or none keeps it all."""
    largest, use, best = problem.damage.max() or 1.0, problem.use.sum(axis=0), None
    low, high = PRICES
    for _ in range(STEPS):
        middle = (low + high) / 2
        picks = problem.cheapest(problem.damage + largest * 2.0**middle * use)
        if problem.keeps(picks):
            high, best = middle, picks
        else:
            low = middle
    return best


def _nearest(problem: _Problem) -> Picks:
    """Return options that keep all limits, with a millionth to spare if possible.

    Raises:
        BudgetTooSmall: there are none; it says where the largest relative overshoot is least.
    """
    picks, _ = _solved(problem, [*range(len(problem.options))], np.zeros(len(problem.options)), overshoot=ROWS)
    picks = picks or problem.cheapest(problem.use.sum(axis=0))
    if not problem.keeps(picks):
        least = {name: problem.amount(picks, name) for name in problem.limits}
        raise BudgetTooSmall(problem.limits, least, is_joint=True)
    return picks


def _searched(problem: _Problem, start: Picks) -> Allocation:
    """Return the best options, found from some that keep the limits.

    What is solved for is the damage above every unit's least, in units of what the best known options have of it, so
    that the solver's tolerances are small beside it even if other options have 10^10 times more.
    """
    least = [min(unit.damage.values()) for unit in problem.units]
    above, floor = problem.damage - [least[index] for index, _ in problem.options], math.fsum(least)
    best, bound, refused = start, floor, list[Picks]()
    for _ in range(ROUNDS):
        room = problem.loss(best) - floor
        if room <= 0:
            break
        options = np.flatnonzero(above <= room * (1 + 1e-9)).tolist()
        picks, cost = _solved(problem, options, above[options] * (COSTS / room), refused=refused)
        bound = max(bound, floor + room / COSTS * cost)
        if picks is None:
            break
        if not problem.keeps(picks):
            refused.append(picks)  # over by less than the solver's tolerance for fractions, 1e-6 of an option
            continue
        best = min(best, picks, key=problem.loss)
        if problem.loss(best) - floor > room / COSTS:
            break
    return problem.allocation(best, bound=bound)


def _solved(
    problem: _Problem, options: Picks, cost: Floats, *, refused: Sequence[Picks] = (), overshoot: float | None = None
) -> tuple[Picks | None, float]:
    """Return those of the options that cost least, if any are found, and what any cost at least.

    Limits can only be exceeded, all by the same part of each, if a cost of such an overshoot is given; a millionth
    below them then gains as much.
    """
    is_option = np.arange(len(options) + 1) < len(options)  # the last variable is the overshoot
    lowest, highest = (0.0, 0.0) if overshoot is None else (-1e-6, math.inf)
    rules = _rules(problem, options, refused)
    entries = [(factor, line, place) for line, rule in enumerate(rules) for place, factor in rule.factors.items()]
    factors, lines, places = zip(*entries, strict=True)
    with _quiet():
        answer = milp(  # type: ignore[no-untyped-call]
            np.append(cost, overshoot or 0.0),
            integrality=is_option,
            bounds=(np.where(is_option, 0.0, lowest), np.where(is_option, 1.0, highest)),
            constraints=(
                csr_array((factors, (lines, places)), shape=(len(rules), len(is_option))),  # type: ignore[no-untyped-call]
                [rule.lowest for rule in rules],
                [rule.highest for rule in rules],
            ),
            options={"mip_rel_gap": 0.0, "node_limit": NODES},
        )
    picks = None if answer.x is None else [option for option, x in zip(options, answer.x, strict=False) if x > 0.5]
    return picks, answer.mip_dual_bound or 0.0


@dataclass(frozen=True, slots=True)
class _Rule:
    """What a sum of variables (options, by their place, and the overshoot) has to be."""

    factors: Mapping[int, float]
    lowest: float
    highest: float


def _rules(problem: _Problem, options: Picks, refused: Sequence[Picks]) -> list[_Rule]:
    """Return that units have one option, ties the same activation bits, that limits are kept, and answers new."""
    places = {option: place for place, option in enumerate(options)}

    def factors(row: Picks, factor: float = 1.0) -> dict[int, float]:
        return {places[option]: factor for option in row if option in places}

    rules = [_Rule(factors([*chain(*rows)]), 1, 1) for tie in problem.ties for rows in zip(*tie, strict=True)]
    pairs = [pair for tie in problem.ties for block in tie for pair in pairwise(block)]
    rules += [_Rule({**factors(one), **factors(other, -1.0)}, 0, 0) for one, other in pairs]
    uses = [[*use[options].tolist(), -1.0] for use in problem.use]
    rules += [_Rule({place: ROWS * amount for place, amount in enumerate(use)}, -math.inf, ROWS) for use in uses]
    return rules + [_Rule(factors(picks), -math.inf, len(picks) - 1) for picks in refused]


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep out of standard output what HiGHS 1.12 writes there whenever it repairs an answer, told to or not.

    It does so in C (https://github.com/jump-dev/HiGHS.jl/issues/312), so the file itself is exchanged; what other
    threads write there meanwhile is lost with it.
    """
    if os.name != "posix":
        yield
        return
    flush = ctypes.CDLL(None).fflush
    with OUTPUT, Path(os.devnull).open("wb") as nothing:
        flush(None)
        output = os.dup(1)
        os.dup2(nothing.fileno(), 1)
        try:
            yield
        finally:
            flush(None)
            os.dup2(output, 1)
            os.close(output)


def _shortages(limits: Mapping[str, float], least: Mapping[str, float]) -> str:
    return "; ".join(
        f"the budget {name}={_written(limits[name])} cannot be met: the least is {_written(amount)}, "
        f"{_written(amount - limits[name])} more"
        for name, amount in least.items()
    )


def _joint_shortage(limits: Mapping[str, float], least: Mapping[str, float]) -> str:
    given = ", ".join(f"{name}={_written(limit)}" for name, limit in limits.items())
    over = {name: f" (+{amount / limits[name] - 1:.2%})" for name, amount in least.items() if amount > limits[name]}
    nearest = ", ".join(f"{name} {_written(amount)}{over.get(name, '')}" for name, amount in least.items())
    return f"the budgets {given} can be met one by one, but not together; the nearest needs {nearest}"


def _written(amount: float) -> str:
    return f"{amount:.0f}" if amount >= 1e5 else f"{amount:.6g}"
