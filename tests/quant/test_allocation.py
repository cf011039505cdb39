"""Allocation: the least damage that all combinations of bits allow, and budgets that none keeps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise, product

import numpy as np
import pytest
from scipy.optimize import minimize

from normfuse.quant import highs
from normfuse.quant.allocation import Allocation, BudgetTooSmall, Unit, allocate, front
from normfuse.quant.bits import Bits
from normfuse.quant.budget import Limit
from normfuse.quant.knapsack import SLACK

FEW = (Bits(2, 4), Bits(4, 4), Bits(4, 8))
ALL = tuple(Bits(weight, activation) for weight in range(2, 9) for activation in range(2, 9))


def unit(name: str, *options: tuple[Bits, float, float], tie: str | None = None) -> Unit:
    """A unit that uses bytes only."""
    return Unit(
        name=name,
        damage={bits: damage for bits, damage, _ in options},
        use={bits: {"bytes": use} for bits, _, use in options},
        tie=tie,
    )


def any_units(seed: int, *, is_tied: bool) -> list[Unit]:
    """Eight units whose options say nothing about each other, of damages over ten orders of magnitude and none."""
    random = np.random.default_rng(seed)
    return [
        Unit(
            name=f"layer{index}",
            damage={bits: float(random.choice([0, 1], p=[0.1, 0.9]) * 10 ** random.uniform(-10, 0)) for bits in FEW},
            use={bits: {"bops": random.uniform(1, 100), "bytes": random.uniform(1, 100)} for bits in FEW},
            tie=f"tie{index % 3}" if is_tied and index % 2 else None,
        )
        for index in range(8)
    ]


def layers(count: int, seed: int, *, together: int = 1) -> list[Unit]:
    """Layers as networks have them, of all widths: damage falls fourfold with every bit, more or less."""
    random = np.random.default_rng(seed)
    units = []
    for index in range(count):
        macs, weights = np.round(10 ** random.uniform([5, 3], [8.5, 6.5]))
        of_weights, of_activations = 10 ** random.uniform(-8, 0, size=2)
        noise = np.exp(random.normal(0, 0.3, size=len(ALL)))
        units.append(
            Unit(
                name=f"layer{index}",
                damage={
                    bits: float(factor * (of_weights * 4.0**-bits.weight + of_activations * 4.0**-bits.activation))
                    for bits, factor in zip(ALL, noise, strict=True)
                },
                use={
                    bits: {
                        "bops": float(macs * bits.weight * bits.activation),
                        "bytes": float(weights * bits.weight / 8),
                    }
                    for bits in ALL
                },
                tie=f"tie{index // together}" if together > 1 else None,
            )
        )
    return units


def limits_at(units: Sequence[Unit], part: float, *resources: str) -> dict[str, float]:
    """Limits between the least and the most that can be used."""
    uses = {name: [[use[name] for use in unit.use.values()] for unit in units] for name in resources}
    return {name: sum((1 - part) * min(use) + part * max(use) for use in uses[name]) for name in resources}


def all_choices(units: Sequence[Unit]) -> list[tuple[Bits, ...]]:
    """Every combination that ties allow."""

    def is_allowed(choice: tuple[Bits, ...]) -> bool:
        tied = {(unit.tie, bits.activation) for unit, bits in zip(units, choice, strict=True) if unit.tie}
        return len(tied) == len({tie for tie, _ in tied})

    return [choice for choice in product(*(unit.damage for unit in units)) if is_allowed(choice)]


def total(units: Sequence[Unit], choice: Sequence[Bits], resource: str) -> float:
    return math.fsum(unit.use[bits][resource] for unit, bits in zip(units, choice, strict=True))


def least_damage(units: Sequence[Unit], limits: Mapping[str, float]) -> float | None:
    """The truth: the least damage of all combinations that keep the limits."""
    kept = [
        choice
        for choice in all_choices(units)
        if all(total(units, choice, name) <= limit * (1 + SLACK) for name, limit in limits.items())
    ]
    losses = (math.fsum(unit.damage[bits] for unit, bits in zip(units, choice, strict=True)) for choice in kept)
    return min(losses, default=None)


def assert_is_sound(found: Allocation, units: Sequence[Unit], limits: Mapping[str, float]) -> None:
    """The sums are those of the bits, limits hold, and ties have the same activation bits."""
    chosen = [found.bits[unit.name] for unit in units]
    assert list(found.bits) == [unit.name for unit in units]
    assert found.damage == math.fsum(unit.damage[bits] for unit, bits in zip(units, chosen, strict=True))
    assert found.use == {name: total(units, chosen, name) for name in found.use}
    assert all(found.use[name] <= limit * (1 + SLACK) for name, limit in limits.items())
    tied = {(unit.tie, bits.activation) for unit, bits in zip(units, chosen, strict=True) if unit.tie}
    assert len(tied) == len({tie for tie, _ in tied})


@pytest.mark.parametrize("is_tied", [False, True])
@pytest.mark.parametrize("resources", [("bops",), ("bops", "bytes")])
def test_no_combination_does_less_damage(resources: tuple[str, ...], is_tied: bool) -> None:
    met = 0
    for seed in range(20):
        units = any_units(seed, is_tied=is_tied)
        limits = limits_at(units, 0.15 + 0.03 * (seed % 10), *resources)
        expected = least_damage(units, limits)
        if expected is None:
            with pytest.raises(BudgetTooSmall):
                allocate(units, limits)
            continue
        met += 1
        found = allocate(units, limits)
        assert found.damage == expected
        assert_is_sound(found, units, limits)
    assert met > 10


@pytest.mark.parametrize(
    ("resources", "together", "parts"),
    [(("bops",), 1, 1e-4), (("bops", "bytes"), 1, 1e-3), (("bops", "bytes"), 4, 1e-3)],
    ids=["bops", "both", "tied"],
)
@pytest.mark.slow
def test_large_networks_are_solved_to_the_end(resources: tuple[str, ...], together: int, parts: float) -> None:
    """``parts`` is what may be gained by parts of options, which only the solver knows to be impossible."""
    units = layers(400, 0, together=together)
    limits = limits_at(units, 0.1, *resources)
    found = allocate(units, limits)
    assert_is_sound(found, units, limits)
    assert found.gap <= 1e-9
    bound = lagrangian_bound(units, limits, together=together, start=found.damage)
    assert bound <= found.damage <= bound / (1 - parts)
    assert allocate(units[::-1], limits).damage == pytest.approx(found.damage, rel=1e-9)


def lagrangian_bound(units: Sequence[Unit], limits: Mapping[str, float], *, together: int, start: float) -> float:
    """What no combination goes below: the least of damage and use at prices, of which the best are looked for."""
    shape = (-1, together, 7, 7)  # ties, their units, bits of weights, bits of activations
    damage = np.array([[unit.damage[bits] for bits in ALL] for unit in units]).reshape(shape)
    use = [np.array([[unit.use[bits][name] / limits[name] for bits in ALL] for unit in units]) for name in limits]

    def above(logarithms: np.ndarray[tuple[int], np.dtype[np.float64]]) -> float:
        prices = start * np.exp(logarithms)
        cost = damage + sum(price * part.reshape(shape) for price, part in zip(prices, use, strict=True))
        least = cost.min(axis=(1, 2, 3)) if together == 1 else cost.min(axis=2).sum(axis=1).min(axis=1)
        return float(prices.sum() - least.sum()) / start

    options = {"maxiter": 4000, "maxfev": 4000, "xatol": 1e-12, "fatol": 1e-12}
    found = minimize(above, np.zeros(len(limits)), method="Nelder-Mead", options=options)  # type: ignore[no-untyped-call]
    return -start * float(found.fun)


def test_loose_limits_leave_the_least_damage_and_of_that_the_least_use() -> None:
    free = unit("free", (Bits(2, 8), 0, 5), (Bits(4, 8), 0, 3), (Bits(8, 8), 0, 4))
    small = unit("small", (Bits(2, 8), 2e-9, 1), (Bits(8, 8), 1e-9, 4))
    found = allocate([free, small], {"bytes": 100})
    assert found == Allocation(bits={"free": Bits(4, 8), "small": Bits(8, 8)}, damage=1e-9, use={"bytes": 7})
    assert allocate([free, small], {}) == found


def test_what_is_not_limited_decides_between_equals() -> None:
    use = {Bits(4, 8): {"bytes": 1.0, "bops": 9.0}, Bits(4, 4): {"bytes": 1.0, "bops": 5.0}}
    found = allocate([Unit(name="one", damage=dict.fromkeys(use, 1.0), use=use)], {"bytes": 1})
    assert found.bits == {"one": Bits(4, 4)}


def test_tied_units_have_the_activation_bits_that_are_best_for_all() -> None:
    one = unit("one", (Bits(2, 4), 5, 1), (Bits(4, 4), 4, 2), (Bits(2, 8), 1, 2), (Bits(4, 8), 0.5, 4), tie="input")
    other = unit("other", (Bits(2, 4), 0, 1), (Bits(4, 8), 0.25, 4), tie="input")
    assert allocate([one, other], {"bytes": 8}).bits == {"one": Bits(4, 8), "other": Bits(4, 8)}
    assert allocate([one, other], {"bytes": 6}).bits == {"one": Bits(2, 8), "other": Bits(4, 8)}
    assert allocate([one, other], {"bytes": 5}).bits == {"one": Bits(4, 4), "other": Bits(2, 4)}
    alone = [replace(each, tie=None) for each in (one, other)]
    assert allocate(alone, {"bytes": 5}).bits == {"one": Bits(4, 8), "other": Bits(2, 4)}


def test_tied_units_use_less_for_the_same_damage() -> None:
    options = ((Bits(4, 4), 1, 4), (Bits(4, 6), 0, 6), (Bits(4, 8), 0, 8))
    found = allocate([unit("one", *options, tie="input"), unit("other", *options, tie="input")], {"bytes": 15})
    assert found.bits == {"one": Bits(4, 6), "other": Bits(4, 6)}


def test_limits_hold_beyond_the_tolerance_of_the_solver() -> None:
    """One part in 10^13 too much is nothing to the solver, but not rounding."""
    high = 0.5 * (1 + 1e-13)
    units = [unit(name, (Bits(8, 8), 0, high), (Bits(4, 8), 1, 0.4), (Bits(2, 8), 3, 0.1)) for name in ("one", "other")]
    found = allocate(units, {"bytes": 1})
    assert found.damage == 1
    assert_is_sound(found, units, {"bytes": 1})
    assert allocate(units, {"bytes": 2 * high}).damage == 0


def test_a_limit_that_is_just_met_is_met() -> None:
    units = [unit(f"layer{index}", (Bits(2, 8), 1, 0.1), (Bits(8, 8), 0, 0.7)) for index in range(3)]
    assert allocate(units, {"bytes": 0.3}).damage == 3  # though 0.1 + 0.1 + 0.1 is more
    for seed in range(20):
        units = any_units(seed, is_tied=True)
        choice = all_choices(units)[seed * 37 % 500]
        limits = {name: total(units, choice, name) for name in ("bops", "bytes")}
        assert allocate(units, limits).damage == least_damage(units, limits)


def test_a_search_that_is_cut_short_says_what_it_may_have_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    units = layers(60, 3)
    limits = limits_at(units, 0.05, "bops", "bytes")
    whole = allocate(units, limits)
    monkeypatch.setattr(highs, "NODES", 0)
    short = allocate(units, limits)
    assert_is_sound(short, units, limits)
    assert 0 < short.gap < 1
    assert short.damage * (1 - short.gap) <= whole.damage <= short.damage


def test_the_solver_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    """HiGHS 1.12 does for this one; see ``_quiet``."""
    units = layers(40, 3)
    allocate(units, limits_at(units, 0.1, "bops"))
    assert capfd.readouterr().out == ""


def test_a_budget_below_the_least_is_refused() -> None:
    units = [unit("one", (Bits(4, 8), 0, 1000), (Bits(2, 8), 1, 800)), unit("other", (Bits(2, 8), 0, 400))]
    with pytest.raises(BudgetTooSmall) as caught:
        allocate(units, {"bytes": 1000})
    assert caught.value.what == "the budget bytes=1kB cannot be met: the least is bytes=1.2kB"
    assert (caught.value.which, caught.value.least) == (("bytes",), {"bytes": 1200})
    assert (caught.value.where, caught.value.exit_code) == ("recipe", 2)


def test_every_budget_below_its_least_is_named() -> None:
    units = any_units(0, is_tied=False)
    with pytest.raises(
        BudgetTooSmall, match=r"the budget bops=1 cannot .*; the budget bytes=2\.5 cannot be met"
    ) as caught:
        allocate(units, {"bops": 1, "bytes": 2.5})
    assert caught.value.which == ("bops", "bytes")


def test_budgets_that_only_fail_together_are_refused_where_they_nearly_hold() -> None:
    use = {Bits(2, 8): {"bytes": 1e6, "bops": 300.0}, Bits(8, 8): {"bytes": 4e6, "bops": 100.0}}
    units = [Unit(name=name, damage=dict.fromkeys(use, 0.5), use=use) for name in ("one", "other")]
    with pytest.raises(BudgetTooSmall) as caught:
        allocate(units, {"bytes": 4e6, "bops": 450})
    assert caught.value.what == (
        "the budgets bytes=4MB, bops=450 can be met one by one, but not together; "
        "the nearest needs bytes=5MB (+25.00%), bops=400"
    )
    assert caught.value.which == ("bytes", "bops")
    assert caught.value.least == {"bytes": 5e6, "bops": 400}


@pytest.mark.parametrize("seed", range(20))
def test_the_least_that_is_told_can_be_asked_for(seed: int) -> None:
    units = any_units(seed, is_tied=True)
    with pytest.raises(BudgetTooSmall) as caught:
        allocate(units, {"bytes": 1})
    told = Limit.parse(caught.value.what.rpartition(" ")[2])
    assert caught.value.least["bytes"] <= told.amount <= 1.001 * caught.value.least["bytes"]
    allocate(units, {"bytes": told.amount})
    with pytest.raises(BudgetTooSmall) as nearly:
        allocate(units, {"bytes": caught.value.least["bytes"] * (1 - 1e-9)})
    assert nearly.value.what.count(str(told)) == 1, "what cannot be met is not told like the least"


def test_amounts_that_are_whole_but_for_rounding_are_told_whole() -> None:
    units = [unit(f"layer{index}", (Bits(2, 8), 1, 0.1)) for index in range(3)]
    with pytest.raises(BudgetTooSmall, match=r"the budget bytes=0\.14 cannot be met: the least is bytes=0\.3\n"):
        allocate(units, {"bytes": 0.14 * (1 - 2e-16)})


@pytest.mark.parametrize(
    ("limits", "least", "said"),
    [
        ({"latency": 1e-3}, {"latency": 0.00123456}, "latency=1ms cannot be met: the least is latency=1.235ms"),
        ({"avg-bits": 4.0}, {"avg-bits": 4.000001}, "avg-bits=4 cannot be met: the least is avg-bits=4.001"),
        ({"drop": 0.5}, {"drop": 1.23449}, "drop=0.5 cannot be met: the least is drop=1.235"),
        ({"bytes": 703_700.0}, {"bytes": 719_893}, "bytes=703.7kB cannot be met: the least is bytes=719.9kB"),
        (
            {"weight-bits": 4e6},
            {"weight-bits": 5e6},
            "weight-bits=4000000 cannot be met: the least is weight-bits=5000000",
        ),
    ],
)
def test_amounts_are_written_as_budgets_write_them(
    limits: Mapping[str, float], least: Mapping[str, float], said: str
) -> None:
    assert BudgetTooSmall(limits, least).what == f"the budget {said}"


@pytest.mark.parametrize("is_joint", [False, True])
def test_limits_of_one_resource_are_told_once(is_joint: bool) -> None:
    limits = {f"activation-bytes at step {step}": 500.0 for step in range(3)}
    least = dict(zip(limits, (510.0, 530.0, 520.0), strict=True))
    found = BudgetTooSmall(limits, least, is_joint=is_joint)
    said = "the budget activation-bytes=500 cannot be met: the least is activation-bytes=530"
    assert found.what == said
    assert (found.which, found.least) == (tuple(limits), least)


def test_amounts_that_no_budget_has_are_told_all_the_same() -> None:
    found = BudgetTooSmall({"latency": 1e-3, "bytes": 10.0}, {"latency": 0.0, "bytes": 11.0}, is_joint=True)
    assert found.what.endswith("the nearest needs latency=0, bytes=11 (+10.00%)")


@pytest.mark.parametrize("is_tied", [False, True])
def test_no_combination_comes_nearer_to_budgets_that_fail_together(is_tied: bool) -> None:
    failed = 0
    for seed in range(10):
        units = any_units(seed, is_tied=is_tied)
        choices = all_choices(units)
        limits = {name: 1.3 * min(total(units, each, name) for each in choices) for name in ("bops", "bytes")}
        over = min(max(total(units, each, name) / limits[name] for name in limits) for each in choices)
        if over > 1:
            failed += 1
            with pytest.raises(BudgetTooSmall) as caught:
                allocate(units, limits)
            assert max(caught.value.least[name] / limits[name] for name in limits) == pytest.approx(over, rel=1e-12)
    assert failed > 3


def test_a_front_falls_from_the_least_to_the_most_useful_amount() -> None:
    units = any_units(5, is_tied=True)
    limits = limits_at(units, 0.5, "bytes")
    found = front(units, "bops", limits, points=7)
    for each in found:
        assert_is_sound(each, units, limits)
        assert each.damage == least_damage(units, {**limits, "bops": each.use["bops"]})
    assert all(one.use["bops"] < other.use["bops"] and one.damage > other.damage for one, other in pairwise(found))
    assert found[-1].damage == least_damage(units, limits)
    kept = [choice for choice in all_choices(units) if total(units, choice, "bytes") <= limits["bytes"]]
    assert found[0].use["bops"] == min(total(units, choice, "bops") for choice in kept)


def test_a_front_of_one_allocation_is_one_point() -> None:
    assert len(front([unit("one", (Bits(8, 8), 1, 5), (Bits(4, 8), 1, 4))], "bytes", points=9)) == 1


def test_a_front_keeps_the_other_limits_or_says_that_none_can() -> None:
    with pytest.raises(BudgetTooSmall, match="the budget bytes=1 "):
        front(any_units(5, is_tied=False), "bops", {"bytes": 1}, points=3)


def test_nothing_to_allocate_is_allocated() -> None:
    assert allocate([], {}) == Allocation(bits={}, damage=0, use={})


ONE = unit("one", (Bits(8, 8), 1, 5))


@pytest.mark.parametrize(
    ("units", "limits", "match"),
    [
        ([unit("one", (Bits(8, 8), -1, 5))], {}, "cannot have damage -1"),
        ([unit("one", (Bits(8, 8), math.nan, 5))], {}, "cannot have damage nan"),
        ([unit("one", (Bits(8, 8), math.inf, 5))], {}, "cannot have damage inf"),
        ([unit("one", (Bits(8, 8), 1, math.nan))], {}, "and use {'bytes': nan}"),
        ([unit("one")], {}, "one needs options"),
        ([replace(ONE, use={})], {}, "one needs options"),
        ([ONE, replace(ONE, name="other", use={Bits(8, 8): {"bops": 1}})], {}, "other at 8 uses"),
        ([ONE, ONE], {}, "two units have the same name"),
        ([ONE], {"bops": 1}, "bops cannot be limited to 1; in use are"),
        ([ONE], {"bytes": 0}, "bytes cannot be limited to 0"),
        ([ONE], {"bytes": math.nan}, "bytes cannot be limited to nan"),
        ([ONE], {"bytes": math.inf}, "bytes cannot be limited to inf"),
        ([replace(ONE, tie="t"), unit("two", (Bits(8, 4), 1, 5), tie="t")], {}, "one, two are tied and have no"),
    ],
)
def test_our_bugs_are_not_allocated(units: Sequence[Unit], limits: Mapping[str, float], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        allocate(units, limits)


@pytest.mark.parametrize(("resource", "points"), [("bytes", 1), ("bops", 3)])
def test_a_front_needs_a_resource_and_two_points(resource: str, points: int) -> None:
    with pytest.raises(ValueError, match=r"two points or more|bops cannot be limited"):
        front([ONE], resource, points=points)
