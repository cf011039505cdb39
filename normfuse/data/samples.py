"""Samples as a stream that can be read again: single samples in, batches of any size out."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from normfuse.errors import BadInput, UsageError

__all__ = ["Array", "Batch", "Labels", "Sample", "Samples"]

Array = NDArray[Any]
Labels = NDArray[np.integer[Any]]


@dataclass(frozen=True, slots=True)
class Sample:
    """One sample: arrays by input name, without a batch axis; ``where`` is said in errors."""

    inputs: Mapping[str, Array]
    where: str


@dataclass(frozen=True, slots=True)
class Batch:
    """Arrays by input name, first axis the batch; labels of the same samples, if there are any."""

    inputs: dict[str, Array]
    labels: Labels | None

    def __len__(self) -> int:
        return len(next(iter(self.inputs.values())))


@dataclass(frozen=True, slots=True, kw_only=True)
class Samples:
    """A source of samples that is read anew for every run; memory holds one batch and the labels.

    ``labels`` are integers, first axis the samples; ``classes`` names them where folders did; ``unused`` are arrays
    of the source that were left out.
    ``read`` starts a new run over the samples.
    """

    source: str
    names: tuple[str, ...]
    count: int
    read: Callable[[], Iterator[Sample]]
    labels: Labels | None = None
    classes: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.count == 0:
            raise BadInput("there are no samples", where=self.source, expected="at least one sample")
        if self.labels is not None and len(self.labels) != self.count:
            raise BadInput(
                f"there are {len(self.labels)} labels for {self.count} samples",
                where=self.source,
                expected="one label per sample",
            )

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Batch]:
        """Yield every sample as a batch of one."""
        return self.batches(1)

    def batches(self, size: int) -> Iterator[Batch]:
        """Yield the samples in order, ``size`` at a time; the last batch may be smaller.

        Raises:
            UsageError: ``size`` is not positive.
            BadInput: samples of one batch have different shapes or types, or their number changed since opening.
        """
        if size < 1:
            raise UsageError(f"the batch size is {size}", expected="1 or more")
        samples, start = self.read(), 0
        while group := list(islice(samples, min(size, self.count - start))):
            labels = None if self.labels is None else self.labels[start : start + len(group)]
            yield Batch({name: _stack(name, group) for name in self.names}, labels)
            start += len(group)
        if start < self.count:
            raise BadInput(
                f"the source gave {self.count} samples at first and {start} now",
                where=self.source,
                expected="the same samples every time",
            )

    def first(self, count: int) -> Samples:
        """Return the first ``count`` samples, or all where there are fewer."""
        kept = min(count, self.count)
        labels = None if self.labels is None else self.labels[:kept]
        return replace(self, count=kept, labels=labels, read=lambda: islice(self.read(), kept))

    def fingerprint(self) -> str:
        """Return the sha256 of names, types, shapes, values and labels, in order."""
        digest = hashlib.sha256()
        for batch in self:
            for name, array in batch.inputs.items():
                _digest(digest, name, array)
        if self.labels is not None:
            _digest(digest, "labels", self.labels.astype(np.int64))
        return digest.hexdigest()


def _stack(name: str, group: list[Sample]) -> Array:
    first = group[0].inputs[name]
    for sample in group:
        array = sample.inputs[name]
        if array.shape != first.shape or array.dtype != first.dtype:
            raise BadInput(
                f"samples differ: {array.dtype}{list(array.shape)} after {first.dtype}{list(first.shape)}",
                where=f"{sample.where}, array {name!r}",
                expected="samples of one shape and type",
                hint="bring them to one shape, or use batches of one",
            )
    return np.stack([sample.inputs[name] for sample in group])


def _digest(digest: hashlib._Hash, name: str, array: Array) -> None:
    # Little endian everywhere, so that one set of samples has one fingerprint.
    ordered = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
    digest.update(f"{name} {ordered.dtype.str} {array.shape};".encode())
    digest.update(ordered.tobytes())
