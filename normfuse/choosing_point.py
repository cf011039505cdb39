"""Which point of the front ships: the budget's, the smallest that keeps the score, or the one that the user names."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from normfuse.bench.accuracy import Metric, Score
from normfuse.build import Engine
from normfuse.errors import UsageError
from normfuse.measure import Measured, accuracy, compare_engines
from normfuse.mixing import Mixing
from normfuse.planning import Plan
from normfuse.quant.allocation import BudgetTooSmall
from normfuse.quant.budget import Limit, Resource
from normfuse.recipe import POINTS, Recipe

__all__ = ["ChoosingPoint", "Front", "refuse_unlabelled_drop"]

Front = tuple[Mapping[str, Any], ...]
"""What was measured of every point, for the report."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChoosingPoint:
    """Plans within a budget; several where points have to be compared.

    Attributes:
        mixing: makes plans.
        recipe: budget, point, and the drop that counts as kept.
        write: writes the engine of a plan.
        what: the float engine first, and the samples that engines are measured on.
        base: the float engine's score, None without labels.
        threads: to measure with.
    """

    mixing: Mixing
    recipe: Recipe
    write: Callable[[Plan], Engine]
    what: Measured
    base: Score | None
    threads: int

    def run(self) -> tuple[Plan, Front]:
        """Return the plan that ships, and the front if it was asked for.

        Raises:
            BudgetTooSmall: no bits keep the limits.
            UsageError: no bits keep a drop, or there is no such point.
        """
        asked = self.recipe.chosen_budget.limits
        drop = next((limit for limit in asked if limit.resource is Resource.DROP), None)
        limits = [limit for limit in asked if limit is not drop]
        if self.recipe.pareto:
            return self._measured(limits)
        return self.mixing.plan(limits) if drop is None else self._smallest(limits, drop), ()

    def _plans(self, limits: Sequence[Limit]) -> list[Plan]:
        """Return the plans of the front, fewest bits first."""
        others = [each for each in limits if each.resource is not Resource.AVERAGE_BITS]
        points = self.mixing.front(limits, points=POINTS)
        if self.recipe.point > len(points):
            raise UsageError(
                f"point cannot be {self.recipe.point}", where="recipe", expected=f"1 to {len(points)}: so many differ"
            )
        return [self.mixing.plan([*others, point]) for point in points]

    def _smallest(self, limits: Sequence[Limit], drop: Limit) -> Plan:
        """Return the plan of the fewest bits that keeps a drop; drops are taken to fall with every point."""
        others = [each for each in limits if each.resource is not Resource.AVERAGE_BITS]
        points, known = self.mixing.front(limits, points=POINTS), dict[int, tuple[Plan, float]]()

        def drop_at(at: int) -> float:
            if at not in known:
                plan = self.mixing.plan([*others, points[at]])
                known[at] = (plan, self._drop(plan))
            return known[at][1]

        low, high = -1, len(points) - 1
        if drop_at(high) > drop.amount:
            raise BudgetTooSmall({drop.resource.value: drop.amount}, {drop.resource.value: drop_at(high)})
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if drop_at(middle) <= drop.amount else (middle, high)
        return known[high][0]

    def _drop(self, plan: Plan) -> float:
        found, _ = accuracy(self.what, self.write(plan).spec(self.recipe.label), threads=self.threads)
        assert self.base is not None
        assert found is not None
        return self.base.drop(found)

    def _measured(self, limits: Sequence[Limit]) -> tuple[Plan, Front]:
        """Return the plan of one point, and all points measured side by side."""
        plans = self._plans(limits)
        specs = [self.write(plan).spec(f"point {number}") for number, plan in enumerate(plans, start=1)]
        comparison = compare_engines(
            replace(self.what, engines=[self.what.engines[0], *specs]),
            batch=self.recipe.batch,
            threads=self.threads,
            speed=self.recipe.measures_speed,
            progress=self.mixing.progress,
        )
        rows = [
            _point(number, plan, comparison.row(spec.label).as_dict() | comparison.ratios(spec.label))
            for number, (plan, spec) in enumerate(zip(plans, specs, strict=True), start=1)
        ]
        chosen = self._chosen(rows)
        return plans[chosen], tuple({**row, "ships": at == chosen} for at, row in enumerate(rows))

    def _chosen(self, rows: Sequence[Mapping[str, Any]]) -> int:
        """Return which point ships: the user's, or the smallest file whose drop is kept, else that of the most bits.

        Of files of one size it is the one that loses least.
        """
        if self.recipe.point:
            return self.recipe.point - 1
        drops, allowed = [row["drop"] for row in rows], self.recipe.allowed_drop
        kept = [at for at, drop in enumerate(drops) if drop is not None and drop <= allowed]
        return min(kept, key=lambda at: (rows[at]["file_bytes"], drops[at]), default=len(rows) - 1)


def refuse_unlabelled_drop(recipe: Recipe, base: Score | None) -> None:
    """Refuse a budget of drop without a score to measure it by.

    Raises:
        UsageError: there are no labels.
    """
    for limit in recipe.chosen_budget.limits:
        if limit.resource is Resource.DROP and base is None:
            raise UsageError(
                f"the budget {limit} needs labelled samples",
                where="recipe",
                expected="samples to measure the drop on",
                hint="--eval DATA with labels, or another budget",
            )


def _point(number: int, plan: Plan, measured: Mapping[str, Any]) -> dict[str, Any]:
    metric = next((each for each in Metric if measured.get(each.value) is not None), None)
    facts = {"number": number, "budget": plan.mixed["budget"], "average_weight_bits": plan.mixed["average_weight_bits"]}
    names = ("file_bytes", "file", "p50_ms", "speedup", "drop", "agreement", "sqnr_db")
    scored = {"score": measured[metric.value], "metric": metric.title} if metric else {}
    return {**facts, **{name: measured.get(name) for name in names}, **scored}
