from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import pytest
from numpy.typing import NDArray

from normfuse.bench.accuracy import Accuracy, compare_outputs, top_1
from normfuse.errors import BadInput

Array = NDArray[np.floating]


def logits(inputs: Mapping[str, Array]) -> Array:
    return inputs["x"]


def test_top_1_counts_over_uneven_batches() -> None:
    generator = np.random.default_rng(1)
    x, labels = generator.standard_normal((23, 7)).astype(np.float32), generator.integers(0, 7, 23)
    expected = sum(
        int(max(range(7), key=lambda column: row[column]) == label) for row, label in zip(x, labels, strict=True)
    )
    found = top_1(logits, [({"x": x[:20]}, labels[:20]), ({"x": x[20:]}, labels[20:].reshape(-1, 1))])
    assert found == Accuracy(expected, 23)
    assert found.top_1 == 100 * expected / 23


def test_an_output_that_is_not_a_number_is_wrong() -> None:
    # numpy's argmax returns the position of the first NaN, which would be right here.
    x = np.array([[np.nan, 1.0], [2.0, 1.0]])
    assert top_1(logits, [({"x": x}, np.array([0, 0]))]) == Accuracy(1, 2)


@pytest.mark.parametrize(
    ("x", "labels", "says"),
    [
        (np.zeros((3, 4, 2)), np.zeros(3, int), r"\[3, 4, 2\] for 3 labels"),
        (np.zeros((3, 4)), np.zeros(2, int), r"\[3, 4\] for 2 labels"),
        (np.zeros((3, 4)), np.array([0, 1, 4]), "from 0 to 4"),
        (np.zeros((3, 4)), np.array([-1, 1, 3]), "from -1 to 3"),
        (np.zeros((3, 4)), np.array([0.0, 1.0, 2.0]), "labels are float64"),
    ],
)
def test_labels_that_do_not_fit_are_refused(x: Array, labels: Array, says: str) -> None:
    with pytest.raises(BadInput, match=says):
        top_1(logits, [({"x": x}, labels)])


def test_nothing_to_evaluate_on_is_refused() -> None:
    with pytest.raises(BadInput, match="nothing to evaluate on"):
        top_1(logits, [])
    with pytest.raises(BadInput, match="nothing to evaluate on"):
        top_1(logits, [({"x": np.zeros((0, 3))}, np.zeros(0, int))])
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


def test_a_drop_of_exact_counts_is_exact() -> None:
    # The difference of the two percentages is above 0.5 by a rounding, and a limit of 0.5 would be missed.
    before, after = Accuracy(644, 1000), Accuracy(639, 1000)
    assert before.top_1 - after.top_1 > 0.5
    assert before.drop(after) == 0.5
    assert Accuracy(1, 2).drop(Accuracy(1, 4)) == 25
