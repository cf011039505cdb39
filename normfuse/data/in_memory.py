"""Samples that a Python program has at hand: arrays, a list of samples, or a function that gives them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeAlias

from normfuse.data.arrays import LABELS, ONLY_INPUT, as_labels, common_length
from normfuse.data.generator import as_array, read_from
from normfuse.data.samples import Array, Sample, Samples
from normfuse.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Data", "read"]

Data: TypeAlias = (
    "Samples | str | Path | Array | Tensor | Mapping[str, Array | Tensor] | Sequence[object] "
    "| Callable[[], Iterable[object]]"
)
"""Everything that ``load_samples`` opens."""

FORMS: Final = (
    "a path, an array or tensor (first axis the samples), a mapping of them by input name, a list of single samples, "
    "a function that returns single samples, or normfuse.Samples"
)


def read(data: object, name: str) -> Samples:
    """Return samples from memory; ``name`` is said in errors.

    Raises:
        UsageError: the data is of no known form.
        BadInput: arrays differ in length, or hold no numbers.
    """
    if isinstance(data, Mapping):
        return _read_columns({str(key): as_array(value, f"{name}, array {key!r}") for key, value in data.items()}, name)
    if hasattr(data, "shape"):
        return _read_columns({ONLY_INPUT: as_array(data, name)}, name)
    if callable(data):
        return read_from(data, name)
    if isinstance(data, Sequence) and not isinstance(data, bytes):
        return read_from(lambda: data, name)
    raise UsageError(
        f"the samples are a {type(data).__name__}",
        where=name,
        expected=FORMS,
        hint="samples are read more than once: give a function that returns the iterable"
        if isinstance(data, Iterable)
        else "",
    )


def _read_columns(columns: dict[str, Array], name: str) -> Samples:
    label = next((key for key in LABELS if key in columns), None)
    inputs = {key: array for key, array in columns.items() if key != label}
    count = common_length({key: array.shape for key, array in inputs.items()}, name)

    def rows() -> Iterator[Sample]:
        for index in range(count):
            yield Sample({key: array[index] for key, array in inputs.items()}, f"{name}, sample {index}")

    labels = None if label is None else as_labels(columns[label], f"{name}: {label}")
    return Samples(source=name, names=tuple(inputs), count=count, labels=labels, read=rows)
