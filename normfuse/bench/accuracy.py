"""How often an engine is right, and how far it is from the float model where there are no labels."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from normfuse.errors import BadInput

__all__ = ["Accuracy", "Closeness", "compare_outputs", "top_1"]

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


@dataclass(frozen=True, slots=True)
class Closeness:
    """How near two engines' outputs are: share of samples with the same largest output (percent), and SQNR (dB)."""

    agreement: float
    sqnr: float
    total: int


def top_1(engine: Engine, batches: Iterable[tuple[Mapping[str, Array], Array]]) -> Accuracy:
    """Count the samples that the engine gets right.

    Raises:
        BadInput: there is nothing to evaluate on, or the first output is not [batch, classes].
    """
    correct = total = 0
    for inputs, labels in batches:
        output = engine(inputs)
        if output.ndim != 2 or len(output) != len(labels):
            raise BadInput(
                f"the first output is {list(output.shape)}",
                where="evaluation",
                expected=f"[{len(labels)}, classes] for top-1 accuracy",
                hint="leave the labels out to compare outputs instead",
            )
        correct += int((output.argmax(axis=1) == labels.reshape(-1)).sum())
        total += len(labels)
    if total == 0:
        raise BadInput("there is nothing to evaluate on", where="evaluation data", expected="at least one sample")
    return Accuracy(correct, total)


def compare_outputs(engine: Engine, reference: Engine, batches: Iterable[Mapping[str, Array]]) -> Closeness:
    """Compare an engine with a reference on the same inputs.

    Raises:
        BadInput: there are no inputs.
    """
    same = total = 0
    signal = noise = 0.0
    for inputs in batches:
        found, wanted = engine(inputs), reference(inputs)
        flat_found, flat_wanted = found.reshape(len(found), -1), wanted.reshape(len(wanted), -1)
        same += int((flat_found.argmax(axis=1) == flat_wanted.argmax(axis=1)).sum())
        total += len(wanted)
        signal += float(np.square(wanted.astype(np.float64)).sum())
        noise += float(np.square(found.astype(np.float64) - wanted).sum())
    if total == 0:
        raise BadInput("there is nothing to compare on", where="evaluation data", expected="at least one sample")
    sqnr = float("inf") if noise == 0 else 10.0 * float(np.log10(max(signal, 1e-300) / noise))
    return Closeness(100.0 * same / total, sqnr, total)
