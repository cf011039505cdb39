"""The call of HiGHS, scipy's solver of mixed-integer programs, for a knapsack; nothing of it reaches the output."""

from __future__ import annotations

import ctypes
import math
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, pairwise
from pathlib import Path
from typing import Final

import numpy as np

from normfuse.quant.knapsack import Floats, Knapsack, Picks

__all__ = ["ROWS", "solved"]

ROWS: Final = 2.0**20
"""What a limit is in the solver's units: its absolute tolerance, 1e-6, is then 1e-12 of it."""

NODES: Final = 20_000
"""Nodes searched at most in each, some minutes. Counted, not timed, so that every machine finds the same bits."""

OUTPUT: Final = threading.Lock()
"""Held while standard output is exchanged, so that two threads put it back in order."""


def solved(
    problem: Knapsack, options: Picks, cost: Floats, *, refused: Sequence[Picks] = (), overshoot: float | None = None
) -> tuple[Picks | None, float]:
    """Return those of the options that cost least, if any are found, and what any cost at least.

    Limits can only be exceeded, all by the same part of each, if a cost of such an overshoot is given; a millionth
    below them then gains as much.
    """
    from scipy.optimize import milp  # type: ignore[attr-defined]  # it has no types
    from scipy.sparse import csr_array

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


def _rules(problem: Knapsack, options: Picks, refused: Sequence[Picks]) -> list[_Rule]:
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
