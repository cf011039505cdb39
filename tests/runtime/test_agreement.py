"""How far an engine's outputs are from the model's, and where nothing can be told."""

from __future__ import annotations

import math

import numpy as np
import pytest

from normfuse.runtime.agreement import output_error

INF, NAN = math.inf, math.nan


def test_the_error_is_relative_to_the_largest_value_expected() -> None:
    assert output_error([[1.0, -4.0]], [[1.0, -5.0]]) == 0.2
    assert output_error(np.array([True, False]), np.array([True, True])) == 1.0
    assert output_error([0.0], [0.5]) == 1.0
    assert output_error([0.25], [0.0]) == 0.25, "nothing to be relative to"


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        pytest.param([1.0, NAN], [1.0, 2.0], id="not a number"),
        pytest.param([NAN, NAN], [NAN, NAN], id="not a number on both sides"),
        pytest.param([1.0, INF], [1.0, 2.0], id="infinite"),
        pytest.param([1.0, 2.0], [1.0, -INF], id="finite where infinite is expected"),
        pytest.param([1.0, INF], [1.0, -INF], id="another infinity"),
        pytest.param([1.0, NAN], [1.0, -INF], id="not a number where infinite is expected"),
        pytest.param([1.0], [1.0, 1.0], id="another shape"),
    ],
)
def test_what_cannot_be_compared_is_infinitely_far(found: list[float], expected: list[float]) -> None:
    assert output_error(found, expected) == INF


def test_the_same_infinity_is_no_difference_and_no_scale() -> None:
    assert output_error([-INF, 3.0], [-INF, 4.0]) == 0.25
