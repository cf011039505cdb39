"""Where relevance starts: predicted classes, given ones, classes of pixels, magnitudes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from normfuse.errors import UsageError
from normfuse.graph import capture
from normfuse.sensitivity.relevance import relevance
from normfuse.sensitivity.targets import class_target, default_target, magnitude_target

SCORES = torch.tensor([[1.0, 3.0, 2.0], [0.5, -1.0, 0.0]])
PIXELS = torch.tensor([[[[2.0, 2.0], [2.0, 0.0]], [[1.0, 1.0], [1.0, 1.0]], [[0.0, 0.0], [0.0, 0.0]]]])
"""One image of two by two, three classes: three pixels are of class 0, one of class 1, none of class 2."""


def only(found: list[Tensor | None]) -> Tensor:
    (given,) = (each for each in found if each is not None)
    return given


def test_the_predicted_class_starts_with_one() -> None:
    assert only(default_target([SCORES])).tolist() == [[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]]


def test_classes_of_pixels_count_the_same() -> None:
    expected = [[[1 / 6, 1 / 6], [1 / 6, 0.0]], [[0.0, 0.0], [0.0, 1 / 2]], [[0.0, 0.0], [0.0, 0.0]]]
    torch.testing.assert_close(only(default_target([PIXELS]))[0], torch.tensor(expected))


def test_labels_may_be_given() -> None:
    assert only(list(class_target(torch.tensor([2, 2]))([SCORES]))).tolist() == [[0.0, 0.0, 1.0], [0.0, 0.0, 1.0]]
    found = only(list(class_target(torch.tensor([[[0, 2], [2, 2]]]))([PIXELS])))
    assert found[0, 0].tolist() == [[0.5, 0.0], [0.0, 0.0]]
    torch.testing.assert_close(found[0, 2], torch.tensor([[0.0, 1 / 6], [1 / 6, 1 / 6]]))


@pytest.mark.parametrize("labels", [torch.tensor([0]), torch.tensor([[0, 1], [0, 1]])])
def test_labels_that_do_not_fit_are_refused(labels: Tensor) -> None:
    with pytest.raises(UsageError, match="do not fit"):
        class_target(labels)([SCORES])


REGRESSIONS = [
    pytest.param(torch.tensor([[-2.0], [4.0]]), [[-1.0], [1.0]], id="one number"),
    pytest.param(torch.tensor([[[1.0, -3.0]], [[0.0, 0.0]]]), [[[0.25, -0.75]], [[0.0, 0.0]]], id="tokens"),
    pytest.param(torch.tensor([3.0, -5.0]), [1.0, -1.0], id="no features"),
]


@pytest.mark.parametrize(("output", "expected"), REGRESSIONS)
def test_a_regression_starts_with_its_magnitudes(output: Tensor, expected: object) -> None:
    assert only(default_target([output])).tolist() == expected


def test_an_embedding_starts_with_its_magnitudes_where_it_is_asked_for() -> None:
    torch.testing.assert_close(only(magnitude_target([SCORES]))[0], torch.tensor([1.0, 3.0, 2.0]) / 6)


def test_of_several_outputs_the_first_with_classes_counts() -> None:
    tokens, places = torch.ones(2, 4, 3), torch.tensor([[1, 2], [3, 4]])
    assert [each is not None for each in default_target([places, tokens, SCORES, SCORES])] == [
        False,
        False,
        True,
        False,
    ]
    assert [each is not None for each in default_target([places, tokens])] == [False, True]


def test_no_floating_point_output_is_refused() -> None:
    with pytest.raises(UsageError, match="no output of floating point"):
        default_target([torch.tensor([[1, 2]])])


def test_a_sum_of_started_relevance_that_is_zero_is_measured_too() -> None:
    """y = (1, -1) starts with (1/2, -1/2), and x = (1, 1) gets both; x = (1, -1) only the first.

    There y = (1, -2) starts with (1/3, -2/3), and nothing contributes positively to the second, which is lost.
    """
    layer = nn.Linear(2, 2, bias=False, dtype=torch.float64)
    layer.weight.data = torch.tensor([[1.0, 0.0], [-2.0, 1.0]], dtype=torch.float64)
    x = torch.tensor([[1.0, 1.0], [1.0, 0.0]], dtype=torch.float64)
    graph = capture(layer, x)
    found = relevance(graph, [x], target=magnitude_target, keep=graph.inputs)
    assert found.kept[graph.inputs[0]].tolist() == [[0.5, -0.5], [1 / 3, 0.0]]
    torch.testing.assert_close(found.conserved, torch.tensor([1.0, 1 + 2 / 3], dtype=torch.float64))
