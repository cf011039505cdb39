"""Samples meet the model: arrays bound to inputs, types cast where nothing is lost, values checked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from normfuse.data.samples import Array, Sample, Samples
from normfuse.errors import BadInput, UnsupportedModel

__all__ = ["InputSpec", "check_samples"]


@dataclass(frozen=True, slots=True)
class InputSpec:
    """An input of the model: ``shape`` with the batch first, None for a dynamic axis; ``dtype`` as NumPy names it."""

    name: str
    shape: tuple[int | None, ...]
    dtype: str


def check_samples(samples: Samples, inputs: Sequence[InputSpec]) -> Samples:
    """Return the samples under the names and in the types of the model's inputs.

    Arrays are bound by name, or by position where there is one array and one input. Float widths change
    freely (a value that overflows is refused); integers may become other integers that hold them, and floats that
    hold them exactly, except uint8, which is what images are before they are scaled. The first sample is checked
    here, every sample again whenever it is read, so that an error names the file, the array and the sample.

    Raises:
        BadInput: names, shapes or types do not fit, or a value is not finite.
        UnsupportedModel: an input has a type that NumPy does not know.
    """
    bound = _bind(samples, inputs)
    checked = replace(
        samples,
        names=tuple(spec.name for spec in inputs),
        read=lambda: _read_checked(samples, bound, inputs),
        unused=tuple(name for name in samples.names if name not in bound.values()),
    )
    next(iter(checked))
    return checked


def _bind(samples: Samples, inputs: Sequence[InputSpec]) -> dict[str, str]:
    wanted = [spec.name for spec in inputs]
    if set(wanted) <= set(samples.names):
        return {name: name for name in wanted}
    if len(wanted) == len(samples.names) == 1:
        return {wanted[0]: samples.names[0]}
    raise BadInput(
        f"the samples have the arrays {', '.join(samples.names)}",
        where=samples.source,
        expected=f"one array for each input of the model: {', '.join(wanted)}",
        hint="name the arrays after the inputs",
    )


def _read_checked(samples: Samples, bound: Mapping[str, str], inputs: Sequence[InputSpec]) -> Iterator[Sample]:
    for sample in samples.read():
        arrays = {}
        for spec in inputs:
            where = f"{sample.where}, array {bound[spec.name]!r}"
            arrays[spec.name] = _checked(sample.inputs[bound[spec.name]], spec, where)
        yield Sample(arrays, sample.where)


def _checked(array: Array, spec: InputSpec, where: str) -> Array:
    _refuse_shape(array, spec, where)
    if np.issubdtype(array.dtype, np.floating) and not np.isfinite(array).all():
        at = [int(axis) for axis in np.argwhere(~np.isfinite(array))[0]]
        raise BadInput(
            f"a value is {array[tuple(at)]}",
            where=f"{where} at {at}",
            expected="finite values everywhere",
            hint="leave the sample out, or repair it",
        )
    return _cast(array, _dtype(spec), spec, where)


def _refuse_shape(array: Array, spec: InputSpec, where: str) -> None:
    expected = spec.shape[1:]
    if len(array.shape) == len(expected) and all(
        size == (size if wanted is None else wanted) for size, wanted in zip(array.shape, expected, strict=True)
    ):
        if array.size == 0:
            raise BadInput(f"the sample is empty: {list(array.shape)}", where=where)
        return
    told = ", ".join("any" if wanted is None else str(wanted) for wanted in expected)
    hint = "check the axes and the size that the model takes"
    if array.ndim == len(spec.shape) and array.ndim > 0:
        hint = "give single samples: the batch axis is added later"
    raise BadInput(
        f"a sample has the shape {list(array.shape)}",
        where=where,
        expected=f"[{told}] for input {spec.name}",
        hint=hint,
    )


def _dtype(spec: InputSpec) -> np.dtype[np.generic]:
    try:
        found = np.dtype(spec.dtype)
    except TypeError:
        found = np.dtype(object)
    # Types that other packages register, bfloat16 among them, are of no kind that NumPy computes with.
    if found.kind in "fiub":
        return found
    raise UnsupportedModel(
        f"input {spec.name} has the type {spec.dtype}",
        expected="a type that NumPy knows",
        hint="export the model with float32 inputs",
    )


def _cast(array: Array, wanted: np.dtype[np.generic], spec: InputSpec, where: str) -> Array:
    if array.dtype == wanted:
        return array
    if not _may_become(array.dtype, wanted):
        raise _wrong_type(array, spec, where)
    with np.errstate(over="ignore", invalid="ignore"):
        cast = array.astype(wanted)
        back = cast.astype(array.dtype)
    if wanted.kind == "f" and not np.isfinite(cast).all():
        raise BadInput(f"a value is too large for {wanted}", where=where, expected=f"{wanted} for input {spec.name}")
    # Both ways: there and back finds rounding, the comparison finds a wrapped sign.
    if array.dtype.kind != "f" and not (np.array_equal(back, array) and np.array_equal(cast, array)):
        raise BadInput(f"a value does not fit into {wanted}", where=where, expected=f"{wanted} for input {spec.name}")
    return cast


def _may_become(found: np.dtype[np.generic], wanted: np.dtype[np.generic]) -> bool:
    if wanted.kind == "f":
        return found.kind in "fib" or (found.kind == "u" and found.itemsize > 1)
    return found.kind in "iub" and wanted.kind in "iub"


def _wrong_type(array: Array, spec: InputSpec, where: str) -> BadInput:
    hint = "convert the array before it is saved"
    if array.dtype == np.uint8:
        hint = "these look like pixels: scale them as in training ((x / 255 - mean) / std), or give the images"
    return BadInput(
        f"the array is {array.dtype}", where=where, expected=f"{spec.dtype} for input {spec.name}", hint=hint
    )
