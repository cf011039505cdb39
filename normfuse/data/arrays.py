"""Samples from NumPy files: ``.npz`` read as a stream, sample by sample, or a folder of ``.npy``."""

from __future__ import annotations

import math
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final

import numpy as np
from numpy.lib import format as npy

from normfuse.data.samples import Array, Labels, Sample, Samples
from normfuse.errors import BadInput

__all__ = ["LABELS", "ONLY_INPUT", "as_labels", "common_length", "read_folder", "read_npz"]

LABELS: Final = ("labels", "label")
# The name of the only input of a folder without sub-folders; it is bound by position.
ONLY_INPUT: Final = "input"
READ_ERRORS: Final = (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error, RuntimeError, KeyError)


@dataclass(frozen=True, slots=True)
class _Header:
    shape: tuple[int, ...]
    fortran: bool
    dtype: np.dtype[Any]


def read_npz(path: Path) -> Samples:
    """Return the samples of an ``.npz`` file.

    Raises:
        BadInput: it is broken, holds objects, or its arrays differ in length.
    """
    headers = _headers(path)
    kept = [name for name in LABELS if name in headers][:1]
    names = tuple(name for name in headers if name not in kept)
    count = common_length({name: headers[name].shape for name in names}, str(path))
    labels = as_labels(_whole(path, kept[0]), f"{path}: {kept[0]}") if kept else None
    return Samples(source=str(path), names=names, count=count, labels=labels, read=lambda: _rows(path, headers, names))


def read_folder(path: Path) -> Samples:
    """Return the samples of a folder of ``.npy`` files.

    Raises:
        BadInput: there are none, sub-folders differ, or a file is broken or holds objects.
    """
    columns = {folder.name: _files(folder) for folder in sorted(path.iterdir()) if folder.is_dir() and _files(folder)}
    alone = [file for file in _files(path) if file.stem not in LABELS]
    if bool(columns) == bool(alone):
        raise BadInput(
            "the folder mixes .npy files and sub-folders of them" if alone else "the folder holds no samples",
            where=str(path),
            expected=".npy files, one per sample, or one sub-folder of them per input, or images",
        )
    columns = columns or {ONLY_INPUT: alone}
    _refuse_gaps(path, columns)
    labels = [file for name in LABELS if (file := path / f"{name}.npy").exists()]
    return Samples(
        source=str(path),
        names=tuple(columns),
        count=len(next(iter(columns.values()))),
        labels=as_labels(_load(labels[0]), str(labels[0])) if labels else None,
        read=lambda: _read_files(columns),
    )


def common_length(shapes: Mapping[str, tuple[int, ...]], where: str) -> int:
    """Return how many samples the arrays hold.

    Raises:
        BadInput: there are none, or their first axes differ.
    """
    if not shapes:
        raise BadInput("there are no arrays", where=where, expected="one array per input of the model")
    lengths = {shape[0] if shape else -1 for shape in shapes.values()}
    if min(lengths) < 0 or len(lengths) > 1:
        told = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
        raise BadInput(
            f"the arrays have different lengths: {told}",
            where=where,
            expected="the first axis of every array is the samples",
        )
    return lengths.pop()


def as_labels(array: Array, where: str) -> Labels:
    """Return integer labels, first axis the samples.

    Raises:
        BadInput: they are no integers.
    """
    if array.ndim == 0 or not np.issubdtype(array.dtype, np.integer):
        raise BadInput(
            f"the labels are {array.dtype}{list(array.shape)}",
            where=where,
            expected="integers, one (or one map) per sample",
        )
    return array


def _headers(path: Path) -> dict[str, _Header]:
    try:
        with zipfile.ZipFile(path) as archive:
            members = [name for name in archive.namelist() if name.endswith(".npy")]
            headers = {}
            for member in members:
                with archive.open(member) as file:
                    headers[member.removesuffix(".npy")] = _header(file, f"{path}: {member}")
    except READ_ERRORS as error:
        raise _broken(path, error) from error
    return headers


def _header(file: IO[bytes], where: str) -> _Header:
    version = npy.read_magic(file)
    read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    header = _Header(*read(file))
    if header.dtype.hasobject or header.dtype.fields is not None:
        raise BadInput(
            "the array holds Python objects, and reading them would run code from the file",
            where=where,
            expected="an array of numbers",
            hint="save it with a number type: array.astype(np.float32)",
        )
    return header


def _rows(path: Path, headers: dict[str, _Header], names: tuple[str, ...]) -> Iterator[Sample]:
    try:
        with zipfile.ZipFile(path) as archive:
            columns = [_column(path, archive, name, headers[name]) for name in names]
            for index, row in enumerate(zip(*columns, strict=True)):
                yield Sample(dict(zip(names, row, strict=True)), f"{path}, sample {index}")
    except READ_ERRORS as error:
        raise _broken(path, error) from error


def _column(path: Path, archive: zipfile.ZipFile, name: str, header: _Header) -> Iterator[Array]:
    if header.fortran:  # samples are scattered over the whole file
        yield from _whole(path, name)
        return
    shape = header.shape[1:]
    size = math.prod(shape) * header.dtype.itemsize
    # A row is read at a time, whether the member is compressed or not: memory holds one sample.
    with archive.open(f"{name}.npy") as file:
        _header(file, str(path))
        for _ in range(header.shape[0]):
            content = file.read(size)
            if len(content) < size:
                raise EOFError(f"array {name} is cut off")
            yield np.frombuffer(content, header.dtype).reshape(shape).copy()


def _whole(path: Path, name: str) -> Array:
    try:
        with np.load(path, allow_pickle=False) as archive:
            array: Array = archive[name]
            return array
    except READ_ERRORS as error:
        raise _broken(path, error) from error


def _files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.glob("*.npy") if file.is_file())


def _refuse_gaps(path: Path, columns: dict[str, list[Path]]) -> None:
    first, *others = columns
    expected = {file.name for file in columns[first]}
    for other in others:
        if lost := expected ^ {file.name for file in columns[other]}:
            raise BadInput(
                f"the sub-folders {first} and {other} differ: {sorted(lost)[0]} is in one of them only",
                where=str(path),
                expected="files of the same names in every sub-folder",
            )


def _read_files(columns: dict[str, list[Path]]) -> Iterator[Sample]:
    for files in zip(*columns.values(), strict=True):
        yield Sample({name: _load(file) for name, file in zip(columns, files, strict=True)}, str(files[0]))


def _load(file: Path) -> Array:
    try:
        with file.open("rb") as opened:
            _header(opened, str(file))
        array: Array = np.load(file, allow_pickle=False)
    except READ_ERRORS as error:
        raise _broken(file, error) from error
    return array


def _broken(path: Path, error: Exception) -> BadInput:
    return BadInput(
        f"the file cannot be read: {error}",
        where=str(path),
        expected="a NumPy file of numbers (.npz, .npy)",
        hint="write it again with np.savez or np.save",
    )
