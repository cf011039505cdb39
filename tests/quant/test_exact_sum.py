from __future__ import annotations

import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from normfuse.errors import BadInput
from normfuse.quant import ExactSum

FINITE = st.floats(allow_nan=False, allow_infinity=False)


def _sum(values: list[float]) -> ExactSum:
    total = ExactSum()
    for value in values:
        total.add(value)
    return total


@given(st.lists(FINITE, max_size=30), st.randoms(), st.integers(0, 30))
def test_order_and_merging_change_nothing(values: list[float], random: object, cut: int) -> None:
    shuffled = list(values)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    merged = _sum(shuffled[:cut])
    merged.merge(_sum(shuffled[cut:]))
    assert merged == _sum(values)


@given(st.lists(st.floats(-1e300, 1e300), max_size=30))
def test_the_value_is_the_exact_sum_rounded_once(values: list[float]) -> None:
    exact = sum((Fraction(value) for value in values), Fraction(0))
    assert _sum(values).value() == float(exact) == math.fsum(values)
    if values:
        assert _sum(values).mean() == float(exact / len(values))


def test_subnormals_and_cancellation() -> None:
    assert _sum([5e-324, 1e308, -1e308]).value() == 5e-324


def test_too_large_for_a_float_is_infinite() -> None:
    assert _sum([-1.7e308, -1.7e308]).value() == -math.inf
    assert _sum([1.7e308, 1.7e308]).mean() == 1.7e308


def test_nothing_is_zero() -> None:
    assert (ExactSum().value(), ExactSum().mean(), ExactSum().count) == (0.0, 0.0, 0)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_not_finite_is_refused(value: float) -> None:
    total = _sum([1.0])
    with pytest.raises(BadInput, match=str(value)):
        total.add(value)
    assert total == _sum([1.0])
