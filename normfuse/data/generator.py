"""Samples from the user's own function, called anew for every run."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np

from normfuse.data.arrays import ONLY_INPUT, as_labels
from normfuse.data.samples import Array, Labels, Sample, Samples
from normfuse.errors import BadInput, NormfuseError, UsageError

__all__ = ["as_array", "read", "read_from"]

EXPECTED: Final = "an array, a tensor or a mapping by input name, or a pair of such a sample and its label"

Pair = tuple[dict[str, Array], Array | None]


def read(source: str) -> Samples:
    """Return the samples of ``package.module:callable``; one run over them counts them and collects the labels.

    Raises:
        UsageError: it cannot be imported or called.
        BadInput: it raises an error, gives no samples, or things that are no samples.
    """
    return read_from(_import(source), source)


def read_from(make: Callable[[], Any], source: str) -> Samples:
    """Return the samples of a function; ``source`` is its name in errors.

    Raises:
        UsageError: it returns nothing that can be iterated over.
        BadInput: it raises an error, gives no samples, or things that are no samples.
    """
    names: tuple[str, ...] = ()
    labels: list[Array] = []
    count = 0
    for count, (inputs, label) in enumerate(_pairs(make, source), start=1):
        names = names or tuple(inputs)
        if tuple(inputs) != names:
            raise BadInput(
                f"the sample has {', '.join(inputs)} where earlier ones have {', '.join(names)}",
                where=f"{source}, sample {count - 1}",
                expected="the same names in every sample",
            )
        labels += [] if label is None else [label]
    if labels and len(labels) != count:
        raise BadInput(f"{count - len(labels)} of {count} samples have no label", where=source)
    return Samples(
        source=source, names=names, count=count, labels=_stack_labels(labels, source), read=lambda: _read(make, source)
    )


def _read(make: Callable[[], Any], source: str) -> Iterator[Sample]:
    for index, (inputs, _) in enumerate(_pairs(make, source)):
        yield Sample(inputs, f"{source}, sample {index}")


def _pairs(make: Callable[[], Any], source: str) -> Iterator[Pair]:
    for index, item in enumerate(_items(make, source)):
        where = f"{source}, sample {index}"
        pair = isinstance(item, tuple | list)
        if pair and len(item) != 2:
            raise BadInput(f"the sample is a {type(item).__name__} of {len(item)}", where=where, expected=EXPECTED)
        inputs, label = item if pair else (item, None)
        named = inputs if isinstance(inputs, Mapping) else {ONLY_INPUT: inputs}
        if not named:
            raise BadInput("the sample is empty", where=where, expected=EXPECTED)
        arrays = {str(name): as_array(value, f"{where}, array {name!r}") for name, value in named.items()}
        yield arrays, None if label is None else as_array(label, f"{where}, label")


def _items(make: Callable[[], Any], source: str) -> Iterator[Any]:
    given = 0
    try:
        iterable = make()
        if not isinstance(iterable, Iterable):
            raise UsageError(
                f"the callable returned {type(iterable).__name__}", where=source, expected="an iterable of samples"
            )
        if isinstance(iterable, Mapping):
            raise UsageError(
                f"the callable returned a {type(iterable).__name__}, which iterates over names",
                where=source,
                expected="an iterable of single samples, each a mapping of one array per input",
                hint="give whole arrays as an .npz file, or in Python as a mapping without a function",
            )
        for item in iterable:
            yield item
            given += 1
    except NormfuseError:
        raise
    # The user's own code may raise anything.
    except Exception as error:
        raise BadInput(
            f"the callable raised {type(error).__name__}: {error}",
            where=f"{source}, sample {given}",
            expected="an iterable of samples",
            hint="run the callable alone, outside of normfuse",
        ) from error


def as_array(value: Any, where: str) -> Array:
    """Return an array or tensor as an array of numbers.

    Raises:
        BadInput: it is none.
    """
    try:
        # A torch tensor, without importing torch for those who have none in their data.
        array = np.asarray(value.detach().cpu().numpy() if hasattr(value, "detach") else value)
    except (ValueError, TypeError, RuntimeError) as error:
        raise BadInput(f"this is no array: {error}", where=where, expected=EXPECTED) from error
    if array.dtype.kind not in "biufc":
        raise BadInput(f"this is no array of numbers but {type(value).__name__}", where=where, expected=EXPECTED)
    return array


def _stack_labels(labels: list[Array], source: str) -> Labels | None:
    if not labels:
        return None
    if len({label.shape for label in labels}) > 1:
        raise BadInput("the labels have different shapes", where=source, expected="labels of one shape")
    return as_labels(np.stack(labels), f"{source}, labels")


def _import(source: str) -> Callable[[], Any]:
    # Unlike `python -m`, a console script does not look into the current folder by itself.
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    name, _, attribute = source.partition(":")
    try:
        found: Any = importlib.import_module(name)
        for part in attribute.split("."):
            found = getattr(found, part)
    # Importing runs the user's own code, which may raise anything.
    except Exception as error:
        raise UsageError(
            f"the samples cannot be imported: {type(error).__name__}: {error}",
            where=source,
            expected="package.module:callable",
            hint="run from the folder that holds the package, or install it",
        ) from error
    if not callable(found):
        raise UsageError(
            f"this is a {type(found).__name__}", where=source, expected="a function that returns an iterable of samples"
        )
    return found  # type: ignore[no-any-return]  # a callable by the check above
