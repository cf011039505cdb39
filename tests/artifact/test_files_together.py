"""Files that belong together are all written, or none is."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from normfuse import atomic
from normfuse.atomic import write_files
from normfuse.errors import BadInput


def held(folder: Path) -> dict[str, bytes]:
    return {each.name: each.read_bytes() for each in folder.iterdir() if each.is_file()}


def test_files_appear_and_nothing_else(tmp_path: Path) -> None:
    write_files({tmp_path / "a": b"1", tmp_path / "b": b"2"}, private=[tmp_path / "a"])
    assert held(tmp_path) == {"a": b"1", "b": b"2"}
    umask = os.umask(0)
    os.umask(umask)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o600 & ~umask
    assert (tmp_path / "b").stat().st_mode & 0o777 == 0o666 & ~umask


def test_a_file_that_was_public_is_private_after(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"0")
    (tmp_path / "a").chmod(0o644)
    write_files({tmp_path / "a": b"1"}, private=[tmp_path / "a"])
    assert (tmp_path / "a").stat().st_mode & 0o077 == 0


def test_a_full_disk_changes_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_bytes(b"before")

    def full(path: Path, data: bytes, mode: int) -> None:
        path.write_bytes(data)
        if data == b"2":
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(atomic, "_write_new", full)
    with pytest.raises(BadInput, match="No space left on device") as failure:
        write_files({tmp_path / "a": b"1", tmp_path / "b": b"2"})
    assert failure.value.where == str(tmp_path / "b")
    assert held(tmp_path) == {"a": b"before"}


def test_a_folder_in_the_way_changes_no_file(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    with pytest.raises(BadInput, match="Is a directory"):
        write_files({tmp_path / "a": b"1", tmp_path / "b": b"2"})
    assert held(tmp_path) == {}


def test_a_file_for_a_folder(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"before")
    with pytest.raises(BadInput, match="Not a directory"):
        write_files({tmp_path / "a" / "b": b"1"})
    with pytest.raises(BadInput, match="too long"):
        write_files({tmp_path / ("n" * 300): b"1"})
    assert held(tmp_path) == {"a": b"before"}
