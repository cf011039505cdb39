"""Bits for every unit under budgets, by least predicted damage: a multiple-choice knapsack, solved by HiGHS."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import ROUND_CEILING, ROUND_FLOOR, Context
from typing import Final

import numpy as np

from normfuse.errors import UsageError
from normfuse.quant.bits import Bits
from normfuse.quant.budget import Limit, Resource
from normfuse.quant.highs import ROWS, solved
from normfuse.quant.knapsack import SLACK, Knapsack, Picks, Unit, exceeds, resources_of

__all__ = ["Allocation", "BudgetTooSmall", "Unit", "allocate", "front"]

COSTS: Final = 1000.0
"""What the best known damage above the floor is there: the solver stops when 1e-9 of it is left to gain."""

PRICES, STEPS = (-80.0, 60.0), 30
"""Exponents (of 2) of prices beside the largest damage, and how often that range is halved."""

ROUNDS: Final = 20
"""Programs solved at most: mostly one; one more after an answer over a limit, or far better than the start."""

DIGITS: Final = 4
"""Of amounts in messages."""


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

    A resource may have several limits, one for each step of a run: its name is the first word of theirs. Messages
    write amounts as budgets do, so that what they say can be asked for.

    Attributes:
        which: the resources whose limits cannot be met each alone, or else all limited ones.
        least: the least amount of each alone, or else the amounts where the largest relative overshoot is least.
    """

    def __init__(self, limits: Mapping[str, float], least: Mapping[str, float], *, is_joint: bool = False) -> None:
        self.which = tuple(least)
        self.least = least
        told = _told_once(limits, least)
        what = _joint_shortage(limits, told) if is_joint and len(told) > 1 else _shortages(limits, told)
        other = (
            "wider weights or activations (--weight-widths, --activation-widths)"
            if Resource.DROP.value in told
            else "fewer bits for more layers (--weight-widths, --activation-widths)"
        )
        super().__init__(what, where="recipe", hint=f"a larger budget, or {other}")


def allocate(units: Sequence[Unit], limits: Mapping[str, float]) -> Allocation:
    """Return the bits of least damage that keep every limit.

    Where options of a unit (or activation bits of a tie) have the same damage, those are taken that use less.

    Raises:
        BudgetTooSmall: no bits keep the limits; the error says by how much.
        ValueError: units or limits make no sense; that is our bug.
    """
    _check(units, limits)
    problem = Knapsack.of(units, limits)
    least = {name: problem.amount(problem.cheapest(use), name) for name, use in zip(limits, problem.use, strict=True)}
    if short := {name: amount for name, amount in least.items() if exceeds(amount, limits[name])}:
        raise BudgetTooSmall(limits, short)
    best = problem.cheapest(problem.damage)
    if problem.keeps(best):
        return _allocation(problem, best, bound=problem.loss(best))
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
    resources = resources_of(units)
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


def _priced(problem: Knapsack) -> Picks | None:
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


def _nearest(problem: Knapsack) -> Picks:
    """Return options that keep all limits, with a millionth to spare if possible.

    Raises:
        BudgetTooSmall: there are none; it says where the largest relative overshoot is least.
    """
    picks, _ = solved(problem, [*range(len(problem.options))], np.zeros(len(problem.options)), overshoot=ROWS)
    picks = picks or problem.cheapest(problem.use.sum(axis=0))
    if not problem.keeps(picks):
        least = {name: problem.amount(picks, name) for name in problem.limits}
        raise BudgetTooSmall(problem.limits, least, is_joint=True)
    return picks


def _searched(problem: Knapsack, start: Picks) -> Allocation:
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
        picks, cost = solved(problem, options, above[options] * (COSTS / room), refused=refused)
        bound = max(bound, floor + room / COSTS * cost)
        if picks is None:
            break
        if not problem.keeps(picks):
            refused.append(picks)  # over by less than the solver's tolerance for fractions, 1e-6 of an option
            continue
        best = min(best, picks, key=problem.loss)
        if problem.loss(best) - floor > room / COSTS:
            break
    return _allocation(problem, best, bound=bound)


def _allocation(problem: Knapsack, picks: Picks, *, bound: float) -> Allocation:
    """Return the picked bits; none that keep the limits have less damage than ``bound``."""
    damage, bits = problem.loss(picks), dict(problem.options[pick] for pick in picks)
    return Allocation(
        bits={unit.name: bits[index] for index, unit in enumerate(problem.units)},
        damage=damage,
        use={name: problem.amount(picks, name) for name in resources_of(problem.units)},
        gap=max(0.0, 1 - bound / damage) if damage else 0.0,
    )


def _told_once(limits: Mapping[str, float], amounts: Mapping[str, float]) -> dict[str, float]:
    """Return of every resource the amount that is farthest above its limit, if it has several."""
    found = dict[str, tuple[float, str]]()
    for name, amount in amounts.items():
        word = name.partition(" ")[0]
        found[word] = max(found.get(word, (-math.inf, "")), (amount / limits[name], name))
    return {name: amounts[name] for _, name in found.values()}


def _shortages(limits: Mapping[str, float], least: Mapping[str, float]) -> str:
    return "; ".join(
        f"the budget {_limit(name, limits[name])} cannot be met: the least is {_amount(name, amount)}"
        for name, amount in least.items()
    )


def _joint_shortage(limits: Mapping[str, float], nearest: Mapping[str, float]) -> str:
    given = ", ".join(_limit(name, limits[name]) for name in nearest)
    over = {name: amount / limits[name] - 1 for name, amount in nearest.items() if exceeds(amount, limits[name])}
    needed = ", ".join(
        f"{_amount(name, amount)}{f' (+{over[name]:.2%})' if name in over else ''}" for name, amount in nearest.items()
    )
    return f"the budgets {given} can be met one by one, but not together; the nearest needs {needed}"


def _limit(name: str, amount: float) -> str:
    """Return a limit with few digits, rounded down: it is never what ``_amount`` says is the least."""
    return _written(name, amount * (1 + SLACK / 2), ROUND_FLOOR)


def _amount(name: str, amount: float) -> str:
    """Return an amount with few digits that is a limit which it keeps."""
    return _written(name, amount / (1 + SLACK / 2), ROUND_CEILING)


def _written(name: str, amount: float, rounding: str) -> str:
    short = float(Context(prec=DIGITS, rounding=rounding).create_decimal_from_float(amount))
    word = name.partition(" ")[0]
    try:
        return str(Limit(Resource(word), short))
    except (ValueError, UsageError):  # no budget has that resource, or could ask for so little of it
        return f"{word}={short:.15g}"
