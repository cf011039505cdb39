"""The user's own key, by which an engine that was built here is told from one of somebody else."""

from __future__ import annotations

import hmac
import os
import secrets
from pathlib import Path
from typing import Final

__all__ = ["is_signed_here", "signature_of"]

KEY_BYTES: Final = 32


def signature_of(text: str) -> str:
    """Return the HMAC-SHA256 of a text by the user's key, in hexadecimal; empty where no key can be kept.

    The key is made at the first call: 32 random bytes in ``normfuse/engine.key`` of the user's configuration folder
    (``XDG_CONFIG_HOME``, else ``~/.config``), which its owner alone may read.
    """
    key = _key()
    return hmac.new(key, text.encode(), "sha256").hexdigest() if key else ""


def is_signed_here(text: str, signature: object) -> bool:
    """Return whether a signature is the one that this user's key gives."""
    own = signature_of(text)
    return bool(own) and isinstance(signature, str) and hmac.compare_digest(own.encode(), signature.encode())


def _key() -> bytes:
    place = _folder() / "engine.key"
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(place, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return _read(place)
    except OSError:  # a home that cannot be written, or none
        return b""
    with os.fdopen(handle, "wb") as file:
        file.write(key := secrets.token_bytes(KEY_BYTES))
    return key


def _read(place: Path) -> bytes:
    """Return the key; one that is cut short or cannot be read is none."""
    try:
        key = place.read_bytes()
    except OSError:
        return b""
    return key if len(key) == KEY_BYTES else b""


def _folder() -> Path:
    named = Path(os.environ.get("XDG_CONFIG_HOME", ""))
    return (named if named.is_absolute() else Path.home() / ".config") / "normfuse"
