"""Files that appear whole or not at all, and errors of the disk in words."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from normfuse.errors import BadInput

__all__ = ["synchronize", "write_file", "writing"]


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
    place = Path(os.path.realpath(target))  # a link stays a link: what it points to is written
    partial = place.with_name(f".{place.name}.partial-{secrets.token_hex(4)}")
    with writing(target):
        try:
            partial.write_bytes(data)
            synchronize(partial)
            partial.replace(place)
            synchronize(place.parent)
        finally:
            partial.unlink(missing_ok=True)


def synchronize(path: Path) -> None:
    """Wait until a file or folder is on disk: after a power failure nothing that is visible may be empty."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
