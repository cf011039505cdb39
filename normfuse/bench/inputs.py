"""What an engine is fed while it is measured: seeded random arrays, or arrays from a file."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from normfuse.errors import BadInput

if TYPE_CHECKING:  # a worker measures its own memory, so it imports nothing that it does not need
    from normfuse.data import Samples

__all__ = ["Wanted", "make_inputs", "write_inputs"]

Array = NDArray[Any]


@dataclass(frozen=True, slots=True)
class Wanted:
    """An input of an engine; None in ``shape`` is an axis of any size, the first axis is the batch."""

    name: str
    shape: tuple[int | None, ...]
    dtype: np.dtype[Any]


def make_inputs(wanted: Sequence[Wanted], *, batch: int, seed: int, source: Path | None = None) -> dict[str, Array]:
    """Return one array per input, ``batch`` samples each.

    Random floats are normal, never zeros or denormals, which run faster or slower than data does; integers are
    0 or 1, valid as class, token and mask alike. Axes of any size other than the batch get size 1, so measure
    models that have some with ``source`` (``write_inputs``).

    Args:
        wanted: the engine's inputs.
        batch: samples per run.
        seed: of the random arrays.
        source: an ``.npz`` with an array per input name; its samples are repeated or cut to the batch.

    Raises:
        BadInput: the model fixes another batch size, or the file lacks an input or cannot be read.
    """
    firsts = [port.shape[0] for port in wanted if port.shape]
    if firsts and not any(size in (None, batch) for size in firsts):
        raise BadInput(f"the model takes batches of {firsts[0]} only", expected=f"a batch of {batch}")
    if source is not None:
        return _from_file(wanted, batch, source)
    generator = np.random.default_rng(seed)
    return {port.name: _random(port, batch, generator) for port in wanted}


def _random(port: Wanted, batch: int, generator: np.random.Generator) -> Array:
    free = [batch, *[1] * len(port.shape)]
    sizes = [free[axis] if size is None else size for axis, size in enumerate(port.shape)]
    if np.issubdtype(port.dtype, np.floating):
        return np.asarray(generator.standard_normal(sizes), dtype=port.dtype)
    return np.asarray(generator.integers(0, 2, sizes), dtype=port.dtype)


def _from_file(wanted: Sequence[Wanted], batch: int, source: Path) -> dict[str, Array]:
    try:
        # Opened here: numpy leaves a file open that turns out to be no archive.
        with source.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            return {port.name: _samples(port, arrays, batch, source) for port in wanted}
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise BadInput(
            f"the inputs cannot be read: {error}", where=str(source), expected="an .npz of arrays"
        ) from error


def _samples(port: Wanted, arrays: Mapping[str, Array], batch: int, source: Path) -> Array:
    if port.name not in arrays or arrays[port.name].shape[:1] in ((), (0,)):
        raise BadInput(f"there are no samples of {port.name}", where=str(source), expected=", ".join(sorted(arrays)))
    found = arrays[port.name]
    if not port.shape:
        return np.asarray(found[0], dtype=port.dtype)  # one number for the whole batch
    return np.ascontiguousarray(found[np.arange(batch) % len(found)], dtype=port.dtype)


def write_inputs(path: Path, samples: Samples, *, batch: int) -> Path:
    """Write the first ``batch`` samples as an ``.npz`` for ``make_inputs``; return its path.

    Samples of other shapes than the first are left out: one batch has one shape. What is missing is repeated by
    whoever reads the file.

    Raises:
        BadInput: the samples cannot be read.
    """
    group = [sample.inputs for sample in islice(samples.read(), batch)]
    alike = [arrays for arrays in group if all(arrays[name].shape == group[0][name].shape for name in samples.names)]
    # Not numpy.savez: inputs may be called like its own parameters.
    with zipfile.ZipFile(path, "w") as archive:
        for name in samples.names:
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array(file, np.stack([arrays[name] for arrays in alike]), allow_pickle=False)
    return path
