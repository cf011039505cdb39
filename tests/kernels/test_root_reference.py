"""The integer root is `isqrt` of everything below 2^62."""

from __future__ import annotations

from math import isqrt

import hypothesis.strategies as st
import torch
from hypothesis import given, settings
from integer_calls import WIDE

from normfuse.kernels.reference import square_root


def assert_roots(numbers: list[int]) -> None:
    assert square_root(torch.tensor(numbers)).tolist() == [isqrt(each) for each in numbers]


def test_root_of_small_numbers() -> None:
    assert_roots(list(range(70_000)))


def test_root_at_corners() -> None:
    roots = {(1 << bit) + step for bit in range(31) for step in (-1, 0, 1)} | {
        (1 << 31) - 1,
        (1 << 31) - 2,
        94906265,
        94906266,
    }
    squares = {root * root + step for root in roots for step in (-1, 0, 1)} | {WIDE - 1, WIDE - 2, 0, 1, 2, 3}
    assert_roots(sorted(each for each in squares if 0 <= each < WIDE))


@given(st.lists(st.integers(0, 2**31 - 1), min_size=200, max_size=200))
@settings(max_examples=25)
def test_root_around_squares(roots: list[int]) -> None:
    assert_roots([max(root * root + step, 0) for root in roots for step in (-1, 0, 1, 2 * root)])


@given(st.lists(st.integers(0, WIDE - 1), min_size=200, max_size=200))
@settings(max_examples=25)
def test_root_of_anything(numbers: list[int]) -> None:
    assert_roots(numbers)
