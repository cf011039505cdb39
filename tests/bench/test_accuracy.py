from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction

import numpy as np
import pytest
from numpy.typing import NDArray

from normfuse.bench.accuracy import Metric, Score, check_labels, compare_outputs, score
from normfuse.errors import BadInput

Array = NDArray[np.floating]


def logits(inputs: Mapping[str, Array]) -> Array:
    return inputs["x"]


def top_1(correct: int, total: int) -> Score:
    return Score(Metric.TOP_1, Fraction(correct, total), total)


def test_top_1_counts_over_uneven_batches() -> None:
    generator = np.random.default_rng(1)
    x, labels = generator.standard_normal((23, 7)).astype(np.float32), generator.integers(0, 7, 23)
    expected = sum(
        int(max(range(7), key=lambda column: row[column]) == label) for row, label in zip(x, labels, strict=True)
    )
    found = score(logits, [({"x": x[:20]}, labels[:20]), ({"x": x[20:]}, labels[20:].reshape(-1, 1))])
    assert found == top_1(expected, 23)
    assert found.percent == pytest.approx(100 * expected / 23, rel=1e-15)


def test_an_output_that_is_not_a_number_is_wrong() -> None:
    # numpy's argmax returns the position of the first NaN, which would be right here.
    x = np.array([[np.nan, 1.0], [2.0, 1.0]])
    assert score(logits, [({"x": x}, np.array([0, 0]))]) == top_1(1, 2)


@pytest.mark.parametrize(
    ("x", "labels", "says"),
    [
        (np.zeros((3, 4, 2)), np.zeros(3, int), r"\[3, 4, 2\] for 3 labels"),
        (np.zeros((3, 4)), np.zeros(2, int), r"\[3, 4\] for 2 labels"),
        (np.zeros((3, 4)), np.zeros((3, 2), int), r"\[3, 4\] for labels \[3, 2\]"),
        (np.zeros((3, 4, 5, 6)), np.zeros(3, int), r"\[3, 4, 5, 6\] for 3 labels"),
        (np.zeros((3, 4, 5, 6)), np.zeros((3, 6, 5), int), r"\[3, 4, 5, 6\] for labels \[3, 6, 5\]"),
        (np.zeros((3, 4, 5, 6)), np.zeros((2, 5, 6), int), r"\[3, 4, 5, 6\] for labels \[2, 5, 6\]"),
        (np.zeros((3, 4, 5, 6)), np.full((3, 5, 6), 4), "from 4 to 4"),
        (np.zeros((3, 4)), np.array([0, 1, 4]), "from 0 to 4"),
        (np.zeros((3, 4)), np.array([-1, 1, 3]), "from -1 to 3"),
        (np.zeros((3, 4)), np.array([0.0, 1.0, 2.0]), "labels are float64"),
    ],
)
def test_labels_that_do_not_fit_are_refused(x: Array, labels: Array, says: str) -> None:
    with pytest.raises(BadInput, match=says):
        score(logits, [({"x": x}, labels)])


def plain_mean_iou(output: Array, labels: NDArray[np.int64]) -> float:
    """The definition, class by class, over the whole set at once."""
    found, shares = np.argmax(output, axis=1), []
    for each in range(output.shape[1]):
        union = np.sum((found == each) | (labels == each))
        if union > 0:
            shares.append(np.sum((found == each) & (labels == each)) / union)
    return float(100 * np.mean(shares))


def maps(classes: int, count: int = 11) -> tuple[Array, NDArray[np.int64]]:
    """Return outputs [count, classes, 5, 7] and labels that they find more often than not."""
    generator = np.random.default_rng(classes)
    labels = generator.integers(0, classes, (count, 5, 7))
    output = generator.standard_normal((count, classes, 5, 7)) + 2 * np.moveaxis(np.eye(classes)[labels], -1, 1)
    return output.astype(np.float32), labels


@pytest.mark.parametrize("classes", [2, 3, 9])
def test_mean_iou_is_its_definition_whatever_the_batches(classes: int) -> None:
    x, labels = maps(classes)
    found = [
        score(logits, [({"x": x[start : start + size]}, labels[start : start + size]) for start in range(0, 11, size)])
        for size in (1, 4, 11)
    ]
    assert found[0] == found[1] == found[2]
    assert (found[0].metric, found[0].total) == (Metric.MEAN_IOU, 11)
    assert 40 < found[0].percent < 95
    # Nine quotients of float64 and their mean.
    assert found[0].percent == pytest.approx(plain_mean_iou(x, labels), rel=20 * 2.3e-16)


def test_mean_iou_is_of_the_whole_set_and_not_the_mean_over_batches() -> None:
    x = np.zeros((2, 2, 1, 4))  # class 0 everywhere
    labels = np.array([[[0, 0, 0, 0]], [[0, 0, 1, 1]]])
    parts = [score(logits, [({"x": x[:1]}, labels[i : i + 1])]).share for i in range(2)]
    assert parts == [1, Fraction(1, 4)]
    assert score(logits, [({"x": x[i : i + 1]}, labels[i : i + 1]) for i in range(2)]).share == Fraction(6, 8) / 2


def test_classes_that_occur_nowhere_are_left_out_of_the_mean() -> None:
    x, labels = maps(4)
    wider = np.concatenate([x, np.full((11, 3, 5, 7), -100, np.float32)], axis=1)
    assert score(logits, [({"x": wider}, labels)]).percent == score(logits, [({"x": x}, labels)]).percent
    wider[0, 5, 0, 0] = 100  # found once, and nowhere right: a class of its own, at zero
    found = score(logits, [({"x": wider}, labels)]).percent
    assert found == pytest.approx(plain_mean_iou(wider, labels), rel=20 * 2.3e-16)
    assert found < 0.81 * score(logits, [({"x": x}, labels)]).percent
    never = np.where(labels == 2, 6, labels)  # labelled, and never found
    assert score(logits, [({"x": x.repeat(2, axis=1)}, never)]).percent == pytest.approx(
        plain_mean_iou(x.repeat(2, axis=1), never), rel=20 * 2.3e-16
    )


def test_one_class_found_everywhere_is_all_right() -> None:
    x = np.zeros((2, 3, 5, 7))
    assert score(logits, [({"x": x}, np.zeros((2, 5, 7), int))]) == Score(Metric.MEAN_IOU, Fraction(1), 2)
    assert score(logits, [({"x": x}, np.ones((2, 5, 7), int))]).percent == 0


def test_a_pixel_that_is_not_a_number_is_no_class() -> None:
    x = np.zeros((1, 2, 1, 4))
    x[0, 0] = 1.0
    x[0, 0, 0, 1] = np.nan  # numpy's argmax says class 0, which would be right
    found = score(logits, [({"x": x}, np.zeros((1, 1, 4), int))])
    assert found.share == Fraction(3, 4)


def test_labels_are_checked_against_axes_of_any_size() -> None:
    labels = np.zeros((3, 5, 7), int)
    check_labels(labels, (None, 4, None, None))
    check_labels(labels, (None, None, 5, None))
    check_labels(labels[:, 0, :1], (None, 4))
    for shape in ((None, 4, 7, None), (None, 4), (None, 4, None), (3, 4, 5, 7, 1)):
        with pytest.raises(BadInput, match="mean IoU"):
            check_labels(labels, shape)


def test_nothing_to_evaluate_on_is_refused() -> None:
    with pytest.raises(BadInput, match="nothing to evaluate on"):
        score(logits, [])
    with pytest.raises(BadInput, match="nothing to evaluate on"):
        score(logits, [({"x": np.zeros((0, 3))}, np.zeros(0, int))])
    with pytest.raises(BadInput, match="nothing to compare on"):
        compare_outputs(logits, logits, [])


def test_sqnr_is_a_ratio_of_powers_over_all_samples() -> None:
    generator = np.random.default_rng(2)
    x = generator.standard_normal((11, 5))
    noise = generator.standard_normal((11, 5)) * 0.1
    found = compare_outputs(lambda inputs: inputs["x"] + noise[: len(inputs["x"])], logits, [{"x": x}])
    signal, error = math.fsum((x**2).ravel()), math.fsum((noise**2).ravel())
    # Sums of 55 squares in float64, and x + noise - x loses eps * |x|: far below 1e-9 dB.
    assert found.sqnr == pytest.approx(10 * math.log10(signal / error), abs=1e-9)
    same = int(((x + noise).argmax(1) == x.argmax(1)).sum())
    assert (found.agreement, found.total) == (100 * same / 11, 11)


def test_sqnr_of_equal_zero_and_broken_outputs() -> None:
    x = np.array([[1.0, 2.0]])
    ways = {
        "equal": (logits, x),
        "silent": (lambda inputs: inputs["x"] + 1.0, x * 0),
        "broken": (lambda inputs: inputs["x"] * np.inf, x),
        "nan": (lambda inputs: inputs["x"] * np.nan, x),
    }
    found = {name: compare_outputs(engine, logits, [{"x": given}]) for name, (engine, given) in ways.items()}
    assert found["equal"].sqnr == math.inf
    assert found["silent"].sqnr == -math.inf
    assert math.isnan(found["broken"].sqnr)
    assert math.isnan(found["nan"].sqnr)
    assert found["nan"].agreement == 0


@pytest.mark.parametrize(("columns", "agreement"), [(1, None), (2, 0.0)])
def test_one_output_per_sample_has_no_largest_to_agree_on(columns: int, agreement: float | None) -> None:
    x = np.arange(1.0, 7.0)[:, None] * np.arange(1.0, 1.0 + columns)
    assert compare_outputs(lambda inputs: -inputs["x"], logits, [{"x": x}]).agreement == agreement


def test_a_drop_of_exact_counts_is_exact() -> None:
    # The difference of the two percentages is above 0.5 by a rounding, and a limit of 0.5 would be missed.
    before, after = top_1(644, 1000), top_1(639, 1000)
    assert before.percent - after.percent > 0.5
    assert before.drop(after) == 0.5
    assert top_1(1, 2).drop(top_1(1, 4)) == 25
