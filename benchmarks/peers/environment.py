"""A virtual environment per peer, made on demand from its pinned requirements."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

__all__ = ["FOLDER", "PeerMissing", "last_line", "python_of"]

HERE = Path(__file__).parent
FOLDER = HERE / ".venvs"
STAMP = "installed.txt"


class PeerMissing(Exception):
    """A peer cannot be installed here; the text says why, in one line."""


def python_of(name: str, requirements: Path, *, folder: Path = FOLDER) -> Path:
    """Return the interpreter of the peer's environment, which has exactly what ``requirements`` names.

    The environment is made anew where the requirements have changed since.

    Raises:
        PeerMissing: pip cannot install them.
    """
    home = folder / name
    wanted, stamp, python = requirements.read_text(encoding="utf-8"), home / STAMP, home / "bin" / "python"
    if stamp.is_file() and stamp.read_text(encoding="utf-8") == wanted:
        return python
    shutil.rmtree(home, ignore_errors=True)
    home.parent.mkdir(parents=True, exist_ok=True)
    _call(name, sys.executable, "-m", "venv", str(home))
    _call(name, str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-r", str(requirements))
    stamp.write_text(wanted, encoding="utf-8")
    return python


def _call(name: str, *command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise PeerMissing(f"{name} cannot be installed: {last_line(done.stderr)}")


def last_line(text: str) -> str:
    """Return the last line that says anything, cut to a table's width."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:160] if lines else "no message"
