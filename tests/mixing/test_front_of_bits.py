"""The front of average bits: built, measured side by side, one point shipped."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from mixed_network import bits_of, compiled, expected, size, stored

from normfuse.built import Built
from normfuse.errors import UsageError
from normfuse.quant.budget import Budget
from normfuse.recipe import POINTS


def points_of(built: Built) -> list[dict[str, Any]]:
    return list(built.report["pareto"]["points"])


def shipped(built: Built) -> dict[str, Any]:
    (found,) = [point for point in points_of(built) if point["ships"]]
    return found


@pytest.mark.slow
def test_the_smallest_point_that_keeps_the_drop_ships() -> None:
    built = compiled(pareto=True, max_drop=20)
    points = points_of(built)
    averages = [point["average_weight_bits"] for point in points]
    assert 1 < len(points) <= POINTS
    assert (averages, averages[0], averages[-1]) == (sorted(averages), 4.0, 8.0)
    assert [point["number"] for point in points] == list(range(1, len(points) + 1))
    assert all(one["budget"] != other["budget"] for one, other in pairwise(points))
    assert points[0]["budget"] == "avg-bits=4", "sums of weights' bits are whole but for rounding"
    for point in points:
        (limit,) = Budget.parse(point["budget"]).limits
        assert point["average_weight_bits"] <= limit.amount < point["average_weight_bits"] + 2e-3
        assert (point["metric"], point["drop"]) == ("top-1", pytest.approx(100 - point["score"]))
    kept = [point["drop"] <= 20 for point in points]
    assert points[kept.index(True)] is not None
    assert shipped(built) == points[kept.index(True)]
    assert built.report["mixed"]["average_weight_bits"] == shipped(built)["average_weight_bits"]
    assert size(built) == shipped(built)["file_bytes"]
    assert stored(built.engine.path) == expected(bits_of(built))
    assert built.holds


@pytest.mark.slow
def test_the_budget_of_a_point_makes_it_again() -> None:
    front = compiled(pareto=True, point=3)
    alone = compiled(budget=shipped(front)["budget"])
    assert bits_of(alone) == bits_of(front)
    assert alone.engine.path.read_bytes() == front.engine.path.read_bytes()
    assert (shipped(front)["number"], alone.report["pareto"]) == (3, {})


@pytest.mark.slow
def test_without_labels_outputs_are_compared_and_the_largest_point_ships() -> None:
    built = compiled(labels=False, pareto=True)
    assert shipped(built) == points_of(built)[-1]
    assert all(point["drop"] is None and point["agreement"] is not None for point in points_of(built))
    assert all("score" not in point for point in points_of(built))


@pytest.mark.slow
def test_a_front_keeps_to_the_budgets() -> None:
    built = compiled(pareto=True, budget="bytes=23kB avg-bits=5.5557")
    points = points_of(built)
    assert all(point["file_bytes"] <= 23_000 for point in points)
    assert all(point["average_weight_bits"] <= 5.5557 for point in points)
    assert all(point["budget"].startswith("bytes=23kB avg-bits=") for point in points)
    assert all(Budget.parse(point["budget"]).limits[1].amount <= 5.5557 for point in points)


@pytest.mark.slow
def test_a_point_that_is_not_there_is_refused() -> None:
    with pytest.raises(UsageError, match="point cannot be 8") as caught:
        compiled(pareto=True, point=8, weight_widths="8", activation_widths="8,16")
    assert caught.value.expected == "1 to 1: so many differ"
