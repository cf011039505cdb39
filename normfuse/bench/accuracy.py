"""How often an engine is right, and how far it is from the float model where there are no labels."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from normfuse.errors import BadInput

__all__ = ["Array", "Closeness", "Engine", "Metric", "Score", "check_labels", "compare_outputs", "score"]

Array = NDArray[Any]
Engine = Callable[[Mapping[str, Array]], Array]
"""From inputs by name to the first output."""


class Metric(Enum):
    """What a score counts; the value is its key in reports."""

    TOP_1 = "top_1"
    """The share of the samples whose largest output is at the label."""
    MEAN_IOU = "mean_iou"
    """Of every class the pixels that are found and right over those that are found or should be; their mean.

    Pixels are counted over the whole set, and classes that occur neither in labels nor in outputs are left out.
    """

    @property
    def title(self) -> str:
        """The metric's name in sentences."""
        return {Metric.TOP_1: "top-1", Metric.MEAN_IOU: "mean IoU"}[self]


@dataclass(frozen=True, slots=True)
class Score:
    """How right an engine is on ``total`` samples; ``share`` is exact, so that a drop at the limit is."""

    metric: Metric
    share: Fraction
    total: int

    @property
    def percent(self) -> float:
        """The share in percent."""
        return float(100 * self.share)

    def drop(self, other: Score) -> float:
        """Return how many points ``other`` is below this."""
        return float(100 * (self.share - other.share))


@dataclass(frozen=True, slots=True)
class Closeness:
    """How near two engines' outputs are.

    ``agreement`` is the share of samples with the same largest output (percent; None for one output per sample),
    ``sqnr`` the power of the reference over the power of the difference, over all samples (dB): infinite where they
    are equal, not a number where one is not finite.
    """

    agreement: float | None
    sqnr: float
    total: int


def score(engine: Engine, batches: Iterable[tuple[Mapping[str, Array], Array]]) -> Score:
    """Compare the largest outputs with the labels; where an output has a NaN in it, none is the largest.

    Args:
        engine: gives [batch, classes], which is scored by top-1, or [batch, classes, height, width], by mean IoU.
        batches: inputs by name, and integer labels, [batch] or [batch, height, width].

    Raises:
        BadInput: there is nothing to evaluate on, labels and the first output do not fit, or a label is no class.
    """
    metric, counts, total = Metric.TOP_1, np.zeros((3, 1), np.int64), 0
    for inputs, labels in batches:
        output, wanted = np.asarray(engine(inputs)), np.asarray(labels)
        check_labels(wanted, output.shape)
        if len(output) != len(wanted):
            raise _do_not_fit(output.shape, wanted)
        metric = Metric.TOP_1 if output.ndim == 2 else Metric.MEAN_IOU
        counts = counts + _counted(output, wanted)
        total += len(output)
    if total == 0:
        raise BadInput("there is nothing to evaluate on", where="evaluation data", expected="at least one sample")
    right, found, labelled = counts
    return Score(
        metric, _mean_iou(right, found, labelled) if metric is Metric.MEAN_IOU else _top_1(right, total), total
    )


def _counted(output: Array, labels: Array) -> NDArray[np.int64]:
    """Return by class what is found and right, found, and labelled."""
    classes, wanted = output.shape[1], labels.reshape(-1)
    has_largest = ~np.isnan(output).any(axis=1).reshape(-1)
    found = output.argmax(axis=1).reshape(-1)
    parts = (found[has_largest & (found == wanted)], found[has_largest], wanted)
    return np.stack([np.bincount(part, minlength=classes) for part in parts])


def _top_1(right: NDArray[np.int64], total: int) -> Fraction:
    return Fraction(int(right.sum()), total)


def _mean_iou(right: NDArray[np.int64], found: NDArray[np.int64], labelled: NDArray[np.int64]) -> Fraction:
    either = found + labelled - right
    shares = [Fraction(int(both), int(union)) for both, union in zip(right, either, strict=True) if union]
    return sum(shares, Fraction(0)) / len(shares)


def check_labels(labels: Array, shape: Sequence[int | None], *, where: str = "evaluation data") -> None:
    """Refuse labels that are no classes of a first output of this shape (None: an axis of any size).

    Raises:
        BadInput: the output is neither [batch, classes] with a label per sample nor [batch, classes, height, width]
            with a map of labels per sample, or a label is no class.
    """
    wanted = np.asarray(labels)
    is_one = len(shape) == 2 and wanted.size == len(wanted)
    is_map = len(shape) == 4 and wanted.ndim == 3 and _fits(wanted.shape[1:], shape[2:])
    if not (is_one or is_map):
        raise _do_not_fit(shape, wanted, where)
    classes = shape[1] if shape[1] is not None else np.inf
    if wanted.size and not (np.issubdtype(wanted.dtype, np.integer) and wanted.min() >= 0 and wanted.max() < classes):
        raise BadInput(
            f"labels are {wanted.dtype} from {wanted.min()} to {wanted.max()}",
            where=where,
            expected=f"integers from 0 to {classes - 1}, the classes of the model",
        )


def _fits(sizes: Sequence[int], wanted: Sequence[int | None]) -> bool:
    return all(limit in (None, size) for size, limit in zip(sizes, wanted, strict=True))


def _do_not_fit(shape: Sequence[int | None], labels: Array, where: str = "evaluation data") -> BadInput:
    sizes = ", ".join("any" if size is None else str(size) for size in shape)
    count = len(labels)
    told = f"{count} labels" if labels.ndim == 1 else f"labels {list(labels.shape)}"
    return BadInput(
        f"the first output is [{sizes}] for {told}",
        where=where,
        expected=f"[{count}, classes] for a label per sample (top-1 accuracy), or [{count}, classes, height, width] "
        f"for labels [{count}, height, width] (mean IoU)",
        hint="leave the labels out to compare outputs instead",
    )


def compare_outputs(engine: Engine, reference: Engine, batches: Iterable[Mapping[str, Array]]) -> Closeness:
    """Compare an engine with a reference on the same inputs.

    Raises:
        BadInput: there are no inputs, or the outputs have different shapes.
    """
    same = total = outputs = 0
    signal = noise = 0.0
    for inputs in batches:
        found, wanted = _wide(engine(inputs)), _wide(reference(inputs))
        if found.shape != wanted.shape:
            raise BadInput(
                f"the outputs compared are {list(found.shape)} and {list(wanted.shape)} (samples, values)",
                where="evaluation",
                expected="engines of one model",
            )
        equal = found.argmax(axis=1) == wanted.argmax(axis=1)
        same += int((equal & ~np.isnan(found).any(axis=1)).sum())
        total += len(wanted)
        outputs = wanted.shape[1]
        signal += float(np.square(wanted).sum())
        with np.errstate(invalid="ignore"):  # infinite minus infinite: the result, not a number, says it
            noise += float(np.square(found - wanted).sum())
    if total == 0:
        raise BadInput("there is nothing to compare on", where="evaluation data", expected="at least one sample")
    return Closeness(100.0 * same / total if outputs > 1 else None, _decibel(signal, noise), total)


def _wide(output: Array) -> NDArray[np.float64]:
    return np.asarray(output, dtype=np.float64).reshape(len(output), -1)


def _decibel(signal: float, noise: float) -> float:
    if not (math.isfinite(signal) and math.isfinite(noise)):
        return math.nan
    if noise == 0:
        return math.inf
    return 10.0 * math.log10(signal / noise) if signal else -math.inf
