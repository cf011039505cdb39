"""The interval of a median: exact ranks, and it holds the median as often as it says."""

from __future__ import annotations

import numpy as np
import pytest

from normfuse.bench.confidence import median_interval


@pytest.mark.parametrize(
    ("count", "rank"),
    # Tables of the sign test: the largest rank whose two tails hold five percent or less.
    [(1, 1), (3, 1), (5, 1), (6, 1), (7, 1), (8, 1), (9, 2), (15, 4), (21, 6), (28, 9)],
)
def test_the_ranks_are_those_of_the_sign_test(count: int, rank: int) -> None:
    values = np.random.default_rng(count).permutation(count).astype(float)
    assert median_interval(values.tolist()) == (rank - 1, count - rank)


def test_it_holds_the_true_median_of_a_skewed_distribution() -> None:
    random = np.random.default_rng(0)
    true = float(np.log(2))  # of the exponential distribution
    drawn = (median_interval(random.exponential(size=21).tolist()) for _ in range(2000))
    held = sum(low <= true <= high for low, high in drawn) / 2000
    # 97.3 % by the binomial; the standard error of the share is 0.36 %.
    assert 0.95 < held < 0.99
