"""Reads every sample once before the work: what is broken is found now, and what the samples may lack is said."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Final

import numpy as np

from normfuse.data.samples import Array, Samples

__all__ = ["survey_calibration", "survey_evaluation"]

FEW: Final = 16
"""Below this one unusual sample makes a range of its own; some hundred samples are usual."""

Advance = Callable[[int], None]


def survey_calibration(samples: Samples, advance: Advance) -> list[str]:
    """Return warnings about samples (bound to the inputs) that are to show what the model will see.

    Raises:
        BadInput: a sample is broken, does not fit, or is not finite.
    """
    count = f"{len(samples)} calibration sample{'' if len(samples) == 1 else 's'}"
    few = f"{count} only: ranges from so few may not hold, some hundred are usual"
    found = [*_unused(samples), *_unvaried(samples, advance), *([few] if len(samples) < FEW else [])]
    return [f"{samples.source}: {text}" for text in found]


def survey_evaluation(samples: Samples, advance: Advance) -> list[str]:
    """Return warnings about samples (bound to the inputs) that accuracy is to be measured on.

    Raises:
        BadInput: a sample is broken, does not fit, or is not finite.
    """
    for _ in samples.read():
        advance(1)
    unlabelled = "there are no labels, so accuracy was not measured and outputs were compared instead"
    found = [*_unused(samples), *([unlabelled] if samples.labels is None else [])]
    return [f"{samples.source}: {text}" for text in found]


def _unused(samples: Samples) -> Iterator[str]:
    if samples.unused:
        names = ", ".join(repr(name) for name in samples.unused)
        are = f"array {names} is" if len(samples.unused) == 1 else f"arrays {names} are"
        yield f"{are} not used: the inputs are called {', '.join(samples.names)}, labels are called label"


def _unvaried(samples: Samples, advance: Advance) -> Iterator[str]:
    """Yield the floating inputs that are the same in all samples."""
    first: Mapping[str, Array] = {}
    same: set[str] = set()
    for sample in samples.read():
        if not first:
            first = sample.inputs
            same = {name for name, array in first.items() if np.issubdtype(array.dtype, np.floating)}
        same = {name for name in same if np.array_equal(sample.inputs[name], first[name])}
        advance(1)
    for name in (name for name in first if name in same):
        if first[name].min() == first[name].max():
            yield f"input {name} is {first[name].flat[0]:g} everywhere: no range can be chosen from that"
        elif len(samples) > 1:
            yield f"input {name} is the same in all {len(samples)} samples"
