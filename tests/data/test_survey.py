"""What samples lack is said, and what is broken is found by reading them once."""

from __future__ import annotations

import numpy as np
import pytest

from normfuse.data import InputSpec, Samples, check_samples, load_samples, survey_calibration, survey_evaluation
from normfuse.data.samples import Array
from normfuse.errors import BadInput

VARIED = np.random.default_rng(0).standard_normal((20, 3)).astype(np.float32)
SPECS = [InputSpec("x", (None, 3), "float32")]


def bound(array: Array, **others: Array) -> Samples:
    return check_samples(load_samples({"x": array, **others}, name="data"), SPECS)


def warnings(samples: Samples) -> list[str]:
    return survey_calibration(samples, lambda steps: None)


def test_good_samples_are_read_once_without_a_word() -> None:
    steps: list[int] = []
    assert survey_calibration(bound(VARIED, label=np.arange(20)), steps.append) == []
    assert sum(steps) == 20
    assert survey_evaluation(bound(VARIED, label=np.arange(20)), steps.append) == []
    assert sum(steps) == 40


@pytest.mark.parametrize(
    ("array", "says"),
    [
        pytest.param(VARIED[:1], ["data: 1 calibration sample only: ranges from so few"], id="one"),
        pytest.param(VARIED[:15], ["data: 15 calibration samples only"], id="few"),
        pytest.param(np.zeros((128, 3)), ["data: input x is 0 everywhere"], id="zeros"),
        pytest.param(np.repeat(VARIED[:1], 128, axis=0), ["data: input x is the same in all 128 samples"], id="equal"),
        pytest.param(np.ones((1, 3)), ["data: input x is 1 everywhere", "data: 1 cal"], id="one of ones"),
    ],
)
def test_samples_that_show_little_are_warned_of(array: Array, says: list[str]) -> None:
    found = warnings(bound(array))
    assert [text.startswith(start) for text, start in zip(found, says, strict=True)] == [True] * len(says)


def test_masks_may_be_the_same_in_all_samples() -> None:
    samples = load_samples({"x": VARIED, "mask": np.ones((20, 4), dtype=np.int64)})
    assert warnings(check_samples(samples, [*SPECS, InputSpec("mask", (None, 4), "int64")])) == []


def test_labels_under_another_name_are_not_ignored_in_silence() -> None:
    samples = bound(VARIED, y=np.arange(20))
    unused = "data: array 'y' is not used: the inputs are called x, labels are called label"
    assert warnings(samples) == [unused]
    assert survey_evaluation(samples, lambda steps: None) == [
        unused,
        "data: there are no labels, so accuracy was not measured and outputs were compared instead",
    ]
    assert "arrays 'y', 'id' are not used" in warnings(bound(VARIED, y=np.arange(20), id=np.arange(20)))[0]


@pytest.mark.parametrize("survey", [survey_calibration, survey_evaluation])
def test_what_is_not_finite_is_found(survey: object) -> None:
    broken = VARIED.copy()
    broken[17, 2] = np.nan
    with pytest.raises(BadInput, match="a value is nan") as caught:
        survey(bound(broken), lambda steps: None)  # type: ignore[operator]  # either function
    assert "data, sample 17" in caught.value.where
