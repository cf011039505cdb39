"""Which point of a front ships, with plans whose drop is known: nothing is built or measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from normfuse import choosing_point
from normfuse.bench.accuracy import Metric
from normfuse.choosing_point import ChoosingPoint, refuse_unlabelled_drop
from normfuse.errors import UsageError
from normfuse.quant.allocation import BudgetTooSmall
from normfuse.quant.budget import Limit
from normfuse.recipe import Recipe

BITS = (4.0, 4.5, 5.0, 5.5, 6.0, 6.5, 7.0, 8.0)
DROPS = (9.0, 7.0, 5.0, 3.0, 2.0, 1.0, 0.4, 0.1)
SIZES = (40, 45, 50, 55, 60, 65, 70, 80)


@dataclass
class KnownFront:
    """Plans by their average bits; every plan that is made is counted."""

    bits: Sequence[float] = BITS
    planned: list[str] = field(default_factory=list)
    asked: list[Limit] = field(default_factory=list)
    progress: Any = None

    def front(self, limits: Sequence[Limit], *, points: int) -> list[Limit]:
        self.asked = list(limits)
        return [Limit.parse(f"avg-bits={bits}") for bits in self.bits[:points]]

    def plan(self, limits: Sequence[Limit]) -> Any:
        written = " ".join(str(limit) for limit in limits)
        self.planned.append(written)
        average = next((limit.amount for limit in limits if limit.resource.value == "avg-bits"), 0.0)
        return SimpleNamespace(bits=average, mixed={"budget": written, "average_weight_bits": average})


class Base:
    """The score of the float engine: what others lose of it is their score."""

    def drop(self, other: float) -> float:
        return other


def choosing(
    front: KnownFront,
    monkeypatch: pytest.MonkeyPatch,
    *,
    drops: Sequence[float] | None = DROPS,
    sizes: Sequence[int] = SIZES,
    **options: Any,
) -> ChoosingPoint:
    """One that measures these drops; None: there are no labels."""
    drop_of = dict(zip(front.bits, drops or (), strict=False))

    def measured(what: Any, *, speed: bool, **rest: Any) -> Any:
        def row(label: str) -> Any:
            at = int(label.split()[1]) - 1
            drop = None if drops is None else drops[at]
            scores = {} if drop is None else {Metric.TOP_1.value: 100.0 - drop}
            return SimpleNamespace(as_dict=lambda: {"drop": drop, "file_bytes": sizes[at], **scores})

        assert [spec.label for spec in what.engines] == ["float", *(f"point {at + 1}" for at in range(len(front.bits)))]
        return SimpleNamespace(row=row, ratios=lambda label: {"speedup": 1.5})

    def write(plan: Any) -> Any:
        return SimpleNamespace(spec=lambda label: SimpleNamespace(label=label, bits=plan.bits))

    monkeypatch.setattr(choosing_point, "replace", lambda what, engines: SimpleNamespace(engines=engines))
    monkeypatch.setattr(choosing_point, "compare_engines", measured)
    monkeypatch.setattr(choosing_point, "accuracy", lambda what, spec, **rest: (drop_of[spec.bits], None))
    recipe = Recipe().with_options(bits="mixed", **options)
    base: Any = None if drops is None else Base()
    what: Any = SimpleNamespace(engines=[SimpleNamespace(label="float")])
    mixing: Any = front
    return ChoosingPoint(mixing=mixing, recipe=recipe, write=write, what=what, base=base, threads=1)


def bits_of(plan: Any) -> float:
    """The average that the plan was asked for."""
    return plan.bits  # type: ignore[no-any-return]


def numbers(points: Sequence[Mapping[str, Any]]) -> list[int]:
    return [point["number"] for point in points if point["ships"]]


def test_a_budget_is_one_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    front = KnownFront()
    plan, points = choosing(front, monkeypatch, budget="avg-bits=5 bytes=2MB").run()
    assert (front.planned, points) == (["bytes=2MB avg-bits=5"], ())
    assert bits_of(plan) == 5


@pytest.mark.parametrize(("allowed", "bits"), [(9.0, 4.0), (8.9, 4.5), (2.0, 6.0), (0.5, 7.0), (0.1, 8.0)])
def test_a_drop_is_kept_by_the_fewest_bits(allowed: float, bits: float, monkeypatch: pytest.MonkeyPatch) -> None:
    front = KnownFront()
    plan, points = choosing(front, monkeypatch, budget=f"drop={allowed}").run()
    assert (bits_of(plan), points) == (bits, ())
    assert len(front.planned) <= 1 + 3, "the widest, and the halvings of eight points"
    assert len(set(front.planned)) == len(front.planned)


def test_a_drop_is_kept_within_other_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    front = KnownFront()
    choosing(front, monkeypatch, budget="drop=2 bytes=2MB avg-bits=7.5").run()
    assert [str(limit) for limit in front.asked] == ["bytes=2MB", "avg-bits=7.5"], "they bound the front"
    assert set(front.planned) <= {f"bytes=2MB avg-bits={bits:g}" for bits in BITS}


def test_a_drop_that_nothing_keeps_is_refused_with_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    front = KnownFront()
    with pytest.raises(BudgetTooSmall, match=r"the budget drop=0\.05 cannot be met: the least is drop=0\.1") as caught:
        choosing(front, monkeypatch, budget="drop=0.05").run()
    assert caught.value.which == ("drop",)
    assert "wider" in caught.value.hint
    assert front.planned == ["avg-bits=8"]


@pytest.mark.parametrize("options", [{}, {"pareto": True}])
def test_a_drop_without_labels_is_refused(options: dict[str, Any]) -> None:
    recipe, base = Recipe().with_options(bits="mixed", budget="bytes=1MB drop=0.5", **options), Base()
    with pytest.raises(UsageError, match=r"the budget drop=0\.5 needs labelled samples"):
        refuse_unlabelled_drop(recipe, None)
    refuse_unlabelled_drop(recipe, base)  # type: ignore[arg-type]
    refuse_unlabelled_drop(recipe.with_options(budget="bytes=1MB"), None)


@pytest.mark.parametrize(("options", "number"), [({"max_drop": 2}, 5), ({}, 7), ({"max_drop": 0}, 8)])
def test_the_smallest_point_that_is_kept_ships(
    options: dict[str, Any], number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, points = choosing(KnownFront(), monkeypatch, pareto=True, **options).run()
    assert numbers(points) == [number]
    assert bits_of(plan) == BITS[number - 1]
    assert [point["average_weight_bits"] for point in points] == list(BITS)
    assert [point["score"] for point in points] == [100.0 - drop for drop in DROPS]


def test_what_is_smallest_is_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """More bits may make a smaller file (fewer scales); of files of one size the one that loses least ships."""
    sizes = (40, 45, 50, 55, 62, 60, 60, 61)
    _, points = choosing(KnownFront(), monkeypatch, pareto=True, max_drop=2, sizes=sizes).run()
    assert numbers(points) == [7]


def test_of_a_front_the_drop_of_the_budget_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    front = KnownFront()
    _, points = choosing(front, monkeypatch, pareto=True, budget="drop=3 bytes=2MB").run()
    assert numbers(points) == [4]
    assert [point["budget"] for point in points] == [f"bytes=2MB avg-bits={bits:g}" for bits in BITS]


def test_without_labels_the_largest_point_ships(monkeypatch: pytest.MonkeyPatch) -> None:
    _, points = choosing(KnownFront(), monkeypatch, drops=None, pareto=True).run()
    assert numbers(points) == [8]
    assert all("score" not in point and point["drop"] is None for point in points)


def test_the_user_may_name_the_point(monkeypatch: pytest.MonkeyPatch) -> None:
    plan, points = choosing(KnownFront(), monkeypatch, pareto=True, point=2).run()
    assert numbers(points) == [2]
    assert bits_of(plan) == 4.5


def test_a_point_that_is_not_there_is_refused_before_anything_is_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    front = KnownFront(bits=BITS[:3])
    with pytest.raises(UsageError, match="point cannot be 4") as caught:
        choosing(front, monkeypatch, pareto=True, point=4).run()
    assert caught.value.expected == "1 to 3: so many differ"
    assert front.planned == []
