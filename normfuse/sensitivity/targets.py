"""Where relevance starts: what of a network's outputs is to be explained."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import torch
from torch import Tensor

from normfuse.errors import UsageError
from normfuse.sensitivity.relevance_call import ratio

__all__ = ["CLASSES", "Target", "class_relevance", "class_target", "default_target", "magnitude_target"]

Target = Callable[[Sequence[Tensor]], Sequence[Tensor | None]]
"""From the outputs of a network to the relevance of each, in its shape; None for an output that gets none."""

CLASSES: Final = 1
"""The axis of class scores: [n, classes], or [n, classes, height, width] for classes of pixels."""


def default_target(outputs: Sequence[Tensor]) -> list[Tensor | None]:
    """Return the predicted classes of the first output that holds class scores, else magnitudes of the first of floats.

    Class scores are [n, classes] or [n, classes, height, width] for two classes or more: see ``class_relevance``.
    Anything else is a regression: see ``magnitudes``.

    Raises:
        UsageError: no output is of floating point.
    """
    at = next((index for index, output in enumerate(outputs) if _is_scores(output)), None)
    if at is None:
        return magnitude_target(outputs)
    return _alone(outputs, at, class_relevance(outputs[at], outputs[at].argmax(dim=CLASSES)))


def magnitude_target(outputs: Sequence[Tensor]) -> list[Tensor | None]:
    """Return the magnitudes of the first output of floating point: what an embedding or a regression starts from.

    Raises:
        UsageError: no output is of floating point.
    """
    at = _first_float(outputs)
    return _alone(outputs, at, magnitudes(outputs[at]))


def class_target(labels: Tensor) -> Target:
    """Return the target that explains these classes instead of the predicted ones.

    Args:
        labels: integers, [n], or [n, height, width] for classes of pixels.
    """

    def target(outputs: Sequence[Tensor]) -> list[Tensor | None]:
        at = next((index for index, output in enumerate(outputs) if _is_scores(output)), None)
        if at is None or outputs[at].argmax(dim=CLASSES).shape != labels.shape:
            raise UsageError(
                "the labels do not fit the outputs",
                where=f"labels {tuple(labels.shape)}",
                expected="one label for every sample, or for every pixel of class scores",
            )
        return _alone(outputs, at, class_relevance(outputs[at], labels.to(outputs[at].device)))

    return target


def class_relevance(scores: Tensor, labels: Tensor) -> Tensor:
    """Return 1 for every sample at its class; for classes of pixels 1 shared out among the classes that are present.

    There each class has the same part, and all its pixels have the same part of that.

    Args:
        scores: [n, classes] or [n, classes, ...].
        labels: integers, [n] or [n, ...].
    """
    chosen = torch.zeros_like(scores).scatter_(CLASSES, labels.unsqueeze(CLASSES), 1)
    pixels = chosen.flatten(2).sum(dim=2) if chosen.ndim > 2 else chosen  # [n, classes]
    present = (pixels > 0).sum(dim=CLASSES, keepdim=True)
    weights = 1 / (pixels.clamp(min=1) * present)
    return chosen * weights.reshape([*weights.shape, *[1] * (chosen.ndim - 2)])


def magnitudes(output: Tensor) -> Tensor:
    """Return ``y / sum |y|``, summed over every sample: of magnitude 1, with the signs of the output, [n, ...]."""
    rows = output.reshape(len(output) if output.ndim else 1, -1)
    return ratio(rows, rows.abs().sum(dim=1, keepdim=True)).reshape(output.shape)


def _is_scores(output: Tensor) -> bool:
    return output.is_floating_point() and output.ndim in (2, 4) and output.shape[CLASSES] > 1


def _first_float(outputs: Sequence[Tensor]) -> int:
    found = next((index for index, output in enumerate(outputs) if output.is_floating_point()), None)
    if found is None:
        raise UsageError(
            "the model has no output of floating point",
            expected="scores, whose relevance can be followed back",
            hint="give a target of your own, or capture the model without its argmax",
        )
    return found


def _alone(outputs: Sequence[Tensor], at: int, relevance: Tensor) -> list[Tensor | None]:
    return [relevance if index == at else None for index in range(len(outputs))]
