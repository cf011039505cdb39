"""What a finished engine takes beyond its budget is told, in amounts that a budget could have."""

from __future__ import annotations

from typing import Any

import pytest

from normfuse.bench.comparison import Comparison, Row
from normfuse.bench.timing import Timing
from normfuse.conclusion import _over_budget
from normfuse.quant.budget import Limit
from normfuse.recipe import Recipe


def row(label: str, size: int, milliseconds: float | None) -> Row:
    timing = None if milliseconds is None else Timing.of([[milliseconds]], batch=1)
    return Row(label=label, timing=timing, peak_bytes=None, file_bytes=size, score=None, closeness=None)


def told(budget: str, size: int = 0, milliseconds: float | None = None, **options: Any) -> list[str]:
    """What is said of an engine of this size and latency, beside a float one of 4 MB and 8 ms."""
    rows = (row("float", 4_000_000, None if milliseconds is None else 8.0), row("mixed", size, milliseconds))
    comparison = Comparison(rows=rows, baseline="float", batch=1, threads=1)
    return _over_budget(comparison, Recipe(bits="mixed", budget=budget, **options))


@pytest.mark.parametrize(
    ("budget", "size", "milliseconds"),
    [
        ("bytes=1MB", 1_000_000, None),
        ("bytes=0.25x", 1_000_000, None),
        ("latency=2.5ms", 1, 2.5),
        ("latency=0.5x", 1, 4.0),
        ("avg-bits=4 bops=1 activation-bytes=1 drop=0.1", 1_000_000, 100.0),
    ],
)
def test_what_is_kept_is_not_told(budget: str, size: int, milliseconds: float | None) -> None:
    assert told(budget, size, milliseconds) == []


@pytest.mark.parametrize("options", [{}, {"pareto": True}])
def test_every_budget_that_is_not_kept_is_told(options: dict[str, Any]) -> None:
    assert told("bytes=1MB latency=0.25x avg-bits=4", 1_200_000, 6.0, **options) == [
        "over the budget bytes=1MB: measured bytes=1.2MB, 0.3x",
        "over the budget latency=0.25x: measured latency=6ms, 0.75x",
    ]


def test_amounts_are_told_with_few_digits() -> None:
    (said,) = told("latency=1ms", 1, 1.23456789)
    assert said == "over the budget latency=1ms: measured latency=1.23457ms, 0.154x"
    assert Limit.parse(said.split()[5].rstrip(",")).amount == pytest.approx(1.23457e-3)


def test_widths_without_a_budget_have_none_to_keep() -> None:
    comparison = Comparison(rows=(row("float", 4, None), row("int8", 5, None)), baseline="float", batch=1, threads=1)
    assert _over_budget(comparison, Recipe(bits=8)) == []


def test_a_latency_that_was_not_measured_is_told() -> None:
    assert told("latency=1us", 1) == ["the budget latency=1us was not held against the engine: it was not measured"]
