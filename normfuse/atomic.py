"""Files that appear whole or not at all, and errors of the disk in words."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from normfuse.errors import BadInput

__all__ = ["synchronize", "write_file", "write_files", "writing", "writing_folder"]


@contextmanager
def writing(target: Path) -> Iterator[None]:
    """Turn errors of the system into ``BadInput`` about ``target``."""
    try:
        yield
    except OSError as error:
        raise BadInput(f"the output cannot be written: {error.strerror or error}", where=str(target)) from error


def write_file(target: Path, data: bytes | memoryview) -> None:
    """Write a file under a hidden name beside ``target``, then rename it; whatever goes wrong, that file is removed.

    Raises:
        BadInput: it cannot be written.
    """
    write_files({target: data})


def write_files(files: Mapping[Path, bytes | memoryview], *, private: Collection[Path] = ()) -> None:
    """Write files that belong together: none is renamed before all are on disk, then they appear in their order.

    Args:
        files: what each is to hold.
        private: those of them that nobody but their owner may read.

    Raises:
        BadInput: one cannot be written; unless it is a rename that failed, all files of before are as they were.
    """
    made: list[tuple[Path, Path, Path]] = []
    try:
        for target, data in files.items():
            with writing(target):
                place = Path(os.path.realpath(target))  # a link stays a link: what it points to is written
                partial = place.with_name(f".{place.name}.partial-{secrets.token_hex(4)}")
                made.append((target, partial, place))
                _write_new(partial, data, 0o600 if target in private else 0o666)
                if place.is_dir():
                    raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        for target, partial, place in made:
            with writing(target):
                partial.replace(place)
                synchronize(place.parent)
    finally:
        for target, partial, _ in made:
            with writing(target):
                partial.unlink(missing_ok=True)


def _write_new(path: Path, data: bytes | memoryview, mode: int) -> None:
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def writing_folder(target: Path, *, check: Callable[[], None]) -> Iterator[Path]:
    """Give a hidden folder beside ``target`` to fill; it becomes ``target`` if nothing is raised inside.

    ``check`` is called just before, and raises where what is there by then must stay. Whatever goes wrong, Ctrl-C
    included, the hidden folder is removed and ``target`` stays as it was. (A process killed outright may leave
    ``.NAME.partial-*`` behind; killed between the two renames, the older folder is whole in ``.NAME.partial-*.old``.)

    Raises:
        BadInput: the disk is full or cannot be written.
    """
    place = Path(os.path.realpath(target))  # a link stays a link: what it points to is written
    folder = place.with_name(f".{place.name}.partial-{secrets.token_hex(4)}")
    old = folder.with_name(f"{folder.name}.old")
    with writing(place):
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir()
    try:
        yield folder
        with writing(place):
            for path in (*folder.rglob("*"), folder):
                synchronize(path)
            check()
            _replace(place, folder, old)
            synchronize(place.parent)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if os.path.lexists(place):
            shutil.rmtree(old, ignore_errors=True)


def _replace(place: Path, folder: Path, old: Path) -> None:
    try:
        if os.path.lexists(place):
            place.rename(old)
        folder.rename(place)
    except BaseException:
        if old.exists() and not os.path.lexists(place):
            old.rename(place)
        raise


def synchronize(path: Path) -> None:
    """Wait until a file or folder is on disk: after a power failure nothing that is visible may be empty."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
