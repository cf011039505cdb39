"""How often an engine is right, and how far it is from the float model where there are no labels."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from normfuse.errors import BadInput

__all__ = ["Accuracy", "Array", "Closeness", "Engine", "check_labels", "compare_outputs", "top_1"]

Array = NDArray[Any]
Engine = Callable[[Mapping[str, Array]], Array]
"""From inputs by name to the first output."""


@dataclass(frozen=True, slots=True)
class Accuracy:
    """Samples whose largest output is at the label."""

    correct: int
    total: int

    @property
    def top_1(self) -> float:
        """The share that is right, in percent."""
        return 100.0 * self.correct / self.total

    def drop(self, other: Accuracy) -> float:
        """Return how many points ``other`` is below this; exact counts where both saw as many samples."""
        if self.total == other.total:
            return 100.0 * (self.correct - other.correct) / self.total
        return self.top_1 - other.top_1


@dataclass(frozen=True, slots=True)
class Closeness:
    """How near two engines' outputs are.

    ``agreement`` is the share of samples with the same largest output (percent), ``sqnr`` the power of the
    reference over the power of the difference, over all samples (dB): infinite where they are equal, not a
    number where one is not finite.
    """

    agreement: float
    sqnr: float
    total: int


def top_1(engine: Engine, batches: Iterable[tuple[Mapping[str, Array], Array]]) -> Accuracy:
    """Count the samples that the engine gets right; an output with a NaN in it never is.

    Args:
        engine: gives [batch, classes].
        batches: inputs by name, and integer labels [batch].

    Raises:
        BadInput: there is nothing to evaluate on, the first output is not [batch, classes], or a label is no class.
    """
    correct = total = 0
    for inputs, labels in batches:
        output = np.asarray(engine(inputs))
        flat = _checked_labels(labels, output)
        right = (output.argmax(axis=1) == flat) & ~np.isnan(output).any(axis=1)
        correct += int(right.sum())
        total += len(flat)
    if total == 0:
        raise BadInput("there is nothing to evaluate on", where="evaluation data", expected="at least one sample")
    return Accuracy(correct, total)


def _checked_labels(labels: Array, output: Array) -> Array:
    check_labels(labels, output.shape)
    flat = np.asarray(labels).reshape(-1)
    if len(output) != len(flat):
        raise _no_classes(output.shape, len(flat))
    return flat


def check_labels(labels: Array, shape: Sequence[int | None], *, where: str = "evaluation data") -> None:
    """Refuse labels that are no classes of a first output of this shape (None: an axis of any size).

    Raises:
        BadInput: the output is not [batch, classes], or a label is no class.
    """
    flat = np.asarray(labels).reshape(-1)
    if len(shape) != 2:
        raise _no_classes(shape, len(flat), where)
    classes = shape[1] if shape[1] is not None else np.inf
    if len(flat) and not (np.issubdtype(flat.dtype, np.integer) and flat.min() >= 0 and flat.max() < classes):
        raise BadInput(
            f"labels are {flat.dtype} from {flat.min()} to {flat.max()}",
            where=where,
            expected=f"integers from 0 to {classes - 1}, the classes of the model",
        )


def _no_classes(shape: Sequence[int | None], count: int, where: str = "evaluation data") -> BadInput:
    sizes = ", ".join("any" if size is None else str(size) for size in shape)
    return BadInput(
        f"the first output is [{sizes}] for {count} labels",
        where=where,
        expected=f"[{count}, classes] for top-1 accuracy",
        hint="leave the labels out to compare outputs instead",
    )


def compare_outputs(engine: Engine, reference: Engine, batches: Iterable[Mapping[str, Array]]) -> Closeness:
    """Compare an engine with a reference on the same inputs.

    Raises:
        BadInput: there are no inputs, or the outputs have different shapes.
    """
    same = total = 0
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
        signal += float(np.square(wanted).sum())
        with np.errstate(invalid="ignore"):  # infinite minus infinite: the result, not a number, says it
            noise += float(np.square(found - wanted).sum())
    if total == 0:
        raise BadInput("there is nothing to compare on", where="evaluation data", expected="at least one sample")
    return Closeness(100.0 * same / total, _decibel(signal, noise), total)


def _wide(output: Array) -> NDArray[np.float64]:
    return np.asarray(output, dtype=np.float64).reshape(len(output), -1)


def _decibel(signal: float, noise: float) -> float:
    if not (math.isfinite(signal) and math.isfinite(noise)):
        return math.nan
    if noise == 0:
        return math.inf
    return 10.0 * math.log10(signal / noise) if signal else -math.inf
