"""What a calibration has finished, kept until the artifact is written: a compile that was killed goes on from there."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import normfuse
from normfuse.atomic import write_file, writing
from normfuse.calibration import ChosenRange, Ranges
from normfuse.graph import Graph, metadata
from normfuse.precision import BlockReport, Quantization
from normfuse.precision.decision_record import decision_from_record, decision_record
from normfuse.quant import Range
from normfuse.strict_json import strict_json

__all__ = ["Checkpoint", "calibration_key", "remove_checkpoint"]

KEY: Final = "key.json"
RANGES: Final = "ranges"
INNER: Final = "bits-"
"""Folders of networks of other bits, of which the best is taken."""

Arrays = dict[str, NDArray[Any]]


def calibration_key(
    graph: Graph, samples: Callable[[], Iterator[Sequence[Tensor]]], choices: Mapping[str, object]
) -> dict[str, str]:
    """Return what a calibration follows from, as SHA-256: the folded graph with its weights, the samples, the choices.

    Args:
        graph: the folded float graph.
        samples: read once.
        choices: what else the result depends on, as text or numbers (bits, effort, seed, placement ...).
    """
    model, data = hashlib.sha256(graph.text().encode()), hashlib.sha256()
    for path in sorted({str(node.target) for node in graph.nodes if node.op == "get_attr"}):
        _hash_tensor(model, path, metadata.attribute(graph.module, path))
    for sample in samples():
        for tensor in sample:
            _hash_tensor(data, "", tensor)
    choice = hashlib.sha256(strict_json({name: str(value) for name, value in choices.items()}).encode())
    return {
        "model": model.hexdigest(),
        "samples": data.hexdigest(),
        "recipe": choice.hexdigest(),
        "normfuse": normfuse.__version__,
        "torch": torch.__version__,
        "threads": str(torch.get_num_threads()),  # sums of other parts differ in their last digit
    }


class Checkpoint:
    """A folder with the finished parts of one calibration; each is there whole, as it was written, or not there.

    ``key.json`` says what the parts belong to. A part is an ``.npz`` without objects beside the SHA-256 of the key,
    its name and its bytes, written after it. A part that was cut off, damaged, changed or made for another key is not
    used.
    ``notes`` say what was found; ``key`` is what the parts belong to.
    """

    def __init__(self, folder: Path, key: Mapping[str, str]) -> None:
        """Open the folder; what another key left in it is removed.

        Raises:
            BadInput: the folder cannot be written.
        """
        self.notes: list[str] = []
        self._folder, text = folder, strict_json(key)
        self.key = dict(key)
        self._key = hashlib.sha256(text.encode()).digest()
        found = _read(folder / KEY)
        with writing(folder):
            if found is not None and found != text.encode():
                self.notes.append(f"{folder} belongs to {_difference(found, key)}: the calibration starts anew")
                remove_checkpoint(folder)
            folder.mkdir(parents=True, exist_ok=True)
        if found != text.encode():
            write_file(folder / KEY, text.encode())

    def ranges(self) -> Ranges | None:
        """Return the ranges, if they were finished."""
        if (arrays := self._load(RANGES)) is None:
            return None
        facts = _facts(arrays)
        chosen = {name: _range_of(found) for name, found in facts["chosen"].items()}
        return Ranges(chosen, int(facts["samples"]))

    def keep_ranges(self, ranges: Ranges) -> None:
        """Write the ranges."""
        chosen = {name: _range_facts(found) for name, found in ranges.chosen.items()}
        self._store(RANGES, {"facts": _as_array({"chosen": chosen, "samples": ranges.samples})})

    def block(self, index: int) -> tuple[Quantization, BlockReport] | None:
        """Return what a block has decided for its own tensors, if it was finished."""
        if (arrays := self._load(_block(index))) is None:
            return None
        facts = _facts(arrays)
        report = BlockReport(**{**facts["report"], "exits": tuple(facts["report"]["exits"])})
        return decision_from_record(
            facts["decision"], {name: torch.from_numpy(each) for name, each in arrays.items()}
        ), report

    def keep_block(self, index: int, decided: Quantization, report: BlockReport) -> None:
        """Write what a block has decided for its own tensors."""
        record, tensors = decision_record(decided)
        facts = {
            "decision": record,
            "report": {
                "exits": report.exits,
                "before": report.before,
                "kept": dict(report.kept),
                "reverted": dict(report.reverted),
            },
        }
        self._store(
            _block(index), {**{name: each.numpy() for name, each in tensors.items()}, "facts": _as_array(facts)}
        )

    def get(self, part: str) -> Any | None:
        """Return the plain data that was kept of a score, if it was."""
        arrays = self._load(_score(part))
        return None if arrays is None else _facts(arrays)

    def put(self, part: str, state: Any) -> None:
        """Write plain data of a score."""
        self._store(_score(part), {"facts": _as_array(state)})

    def inner(self, name: str, key: Mapping[str, str]) -> Checkpoint:
        """Return a checkpoint in a folder of this one, for a part of the work under a key of its own."""
        return Checkpoint(self._folder / f"{INNER}{name}", key)

    def _store(self, part: str, arrays: Mapping[str, NDArray[Any]]) -> None:
        buffer = io.BytesIO()
        np.savez(buffer, allow_pickle=False, **arrays)
        write_file(self._folder / f"{part}.npz", buffer.getbuffer())
        write_file(self._folder / f"{part}.sha256", self._digest(part, buffer.getbuffer()).encode())

    def _load(self, part: str) -> Arrays | None:
        data, wanted = _read(self._folder / f"{part}.npz"), _read(self._folder / f"{part}.sha256")
        if data is None and wanted is None:
            return None
        if data is None or wanted is None or self._digest(part, data).encode() != wanted:
            self.notes.append(f"{self._folder / part}.npz is not what was written: it is computed again")
            return None
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}

    def _digest(self, part: str, data: bytes | memoryview) -> str:
        return hashlib.sha256(self._key + part.encode() + hashlib.sha256(data).digest()).hexdigest()


def remove_checkpoint(folder: Path) -> None:
    """Remove the parts, and the folder unless others have put something into it."""
    if not (folder / KEY).is_file():
        return
    for inner in folder.glob(f"{INNER}*"):
        remove_checkpoint(inner)
    names = [f"{part}.{end}" for part in (RANGES, "block-*", _score("*")) for end in ("npz", "sha256")]
    for path in [path for name in (*names, KEY) for path in folder.glob(name)]:
        path.unlink(missing_ok=True)
    with suppress(OSError):
        folder.rmdir()


def _score(part: str) -> str:
    return f"score-{part}"


def _block(index: int) -> str:
    return f"block-{index:04d}"


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except OSError:
        return None


def _difference(found: bytes, key: Mapping[str, str]) -> str:
    try:
        kept = json.loads(found)
        names = [name for name, value in key.items() if kept.get(name) != value]
    except (ValueError, AttributeError):
        names = []
    return f"another {' and '.join(names)}" if names else "something else"


def _hash_tensor(digest: Any, name: str, tensor: Tensor) -> None:
    digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
    digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _as_array(facts: object) -> NDArray[np.uint8]:
    return np.frombuffer(json.dumps(facts).encode(), dtype=np.uint8)


def _facts(arrays: Arrays) -> Any:
    return json.loads(arrays.pop("facts").tobytes())


def _range_facts(found: ChosenRange) -> dict[str, object]:
    return {
        "range": [found.range.minimum, found.range.maximum],
        "observed": [found.observed.minimum, found.observed.maximum],
        "method": found.method,
        "layer": found.layer,
        "errors": dict(found.errors),
    }


def _range_of(facts: dict[str, Any]) -> ChosenRange:
    ends = {name: Range(*facts[name]) for name in ("range", "observed")}
    return ChosenRange(**{**facts, **ends})
