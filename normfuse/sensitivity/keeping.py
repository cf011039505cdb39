"""What a score has finished, kept on disk: a run that is killed and started again goes on from there."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from normfuse.atomic import write_file, writing
from normfuse.sensitivity.sensitivity import Tally
from normfuse.strict_json import strict_json

__all__ = ["FORGETFUL", "Keeper", "KeptOnDisk", "steps"]


class Keeper(Protocol):
    """Something that remembers what is plain data, by name."""

    def get(self, part: str) -> Any | None:
        """Return what was kept, None if nothing was."""
        ...

    def put(self, part: str, state: Any) -> None:
        """Keep plain data in the place of what was kept before."""
        ...


class _Forgetful:
    def get(self, part: str) -> Any | None:
        return None

    def put(self, part: str, state: Any) -> None:
        pass


FORGETFUL: Keeper = _Forgetful()


@dataclass(frozen=True, slots=True)
class KeptOnDisk:
    """A folder of JSON files, each beside the key of what it belongs to and the hash of its text.

    What was cut off, changed or made for another key is not used.
    """

    folder: Path
    key: Mapping[str, str]

    def get(self, part: str) -> Any | None:
        """Return what was kept under the key."""
        with suppress(OSError, ValueError, KeyError, TypeError):
            found = json.loads((self.folder / f"{part}.json").read_text(encoding="utf-8"))
            if found["key"] == dict(self.key) and found["sha256"] == _digest(found["state"]):
                return found["state"]
        return None

    def put(self, part: str, state: Any) -> None:
        """Write a part, whole or not at all.

        Raises:
            BadInput: the folder cannot be written.
        """
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        text = strict_json({"key": dict(self.key), "sha256": _digest(json.loads(json.dumps(state))), "state": state})
        write_file(self.folder / f"{part}.json", text.encode())

    def remove(self) -> None:
        """Remove the parts, and the folder unless others have put something into it."""
        for path in self.folder.glob("*.json"):
            path.unlink(missing_ok=True)
        with suppress(OSError):
            self.folder.rmdir()


def steps(keeper: Keeper, part: str, tallies: Sequence[Tally], total: int) -> Iterator[tuple[int, bool]]:
    """Yield the numbers of all steps and whether each is done already; tallies are restored first, kept after each."""
    done = 0
    if (state := keeper.get(part)) is not None and len(state["tallies"]) == len(tallies):
        done = int(state["done"])
        for tally, kept in zip(tallies, state["tallies"], strict=True):
            tally.restore(kept)
    for at in range(total):
        yield at, at < done
        if at >= done:
            keeper.put(part, {"done": at + 1, "tallies": [tally.as_dict() for tally in tallies]})


def _digest(state: Any) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()
