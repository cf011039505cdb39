"""The key that tells one's own engines from those of others."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from normfuse.runtime.engine_key import is_signed_here, signature_of


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    return tmp_path


def test_a_key_is_made_once_and_is_its_owners_alone(config: Path) -> None:
    first = signature_of("text")
    place = config / "normfuse" / "engine.key"
    assert stat.S_IMODE(place.stat().st_mode) == 0o600
    assert len(key := place.read_bytes()) == 32
    assert signature_of("text") == first
    assert place.read_bytes() == key
    assert is_signed_here("text", first)
    for signature in (signature_of("texts"), first.upper(), "", None, 3):
        assert not is_signed_here("text", signature)


def test_every_key_is_another(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    signature = signature_of("text")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "other"))
    assert not is_signed_here("text", signature)


def test_without_an_absolute_folder_it_lies_in_the_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert signature_of("text")
    assert (tmp_path / ".config" / "normfuse" / "engine.key").exists()


@pytest.mark.parametrize("held", [b"", b"short", b"x" * 33])
def test_a_key_that_is_cut_short_signs_nothing(config: Path, held: bytes) -> None:
    (config / "normfuse").mkdir()
    (config / "normfuse" / "engine.key").write_bytes(held)
    assert signature_of("text") == ""
    assert not is_signed_here("text", "")


def test_where_no_key_can_be_kept_nothing_is_signed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "file"))
    assert signature_of("text") == ""
    assert not is_signed_here("text", "")
