"""One engine, alone in its process: reads orders on standard input, answers with times and memory."""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from normfuse.bench.inputs import Wanted, make_inputs
from normfuse.errors import BadInput, NormfuseError

__all__ = ["main"]

Run = Callable[[], object]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Order:
    """The first line: what to open and how."""

    kind: str
    path: str
    batch: int
    threads: int
    session_config: dict[str, str] = field(default_factory=dict)
    seed: int = 0
    inputs: str | None = None

    def feeds(self, wanted: Sequence[Wanted]) -> dict[str, Any]:
        source = None if self.inputs is None else Path(self.inputs)
        return make_inputs(wanted, batch=self.batch, seed=self.seed, source=source)


def main() -> int:
    """Open the engine that the first line describes, then obey one JSON order per line until ``exit`` or the end.

    ``{"warmup": n}`` runs n times; ``{"run": n}`` also answers ``{"milliseconds": [...]}``, with ``"lasting":
    seconds`` it goes on until so much time is over, with ``"most": m`` after m runs at the latest; ``{"memory": 1}``
    answers ``{"before_load": bytes, "after_load": bytes, "peak": bytes}``; ``{"exit": 1}`` ends. Mistakes in
    model or inputs go to standard error, and the exit code is that of ``normfuse.errors``.
    """
    # Ctrl-C reaches the whole group of processes; the parent decides, and its end closes standard input.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    answers = _private_output()
    before = _status("VmRSS")
    try:
        order = _Order(**json.loads(sys.stdin.readline()))
        opener = {"onnxruntime": _open_onnx, "torch": _open_torch, "torch.compile": _open_compiled}[order.kind]
        run, shapes = opener(order)
    except NormfuseError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    memory = {"before_load": before, "after_load": _status("VmRSS")}
    _answer(answers, {"ready": True, "inputs": shapes})
    # A collection in the middle of a run would be counted as the engine's time.
    gc.collect()
    gc.disable()
    for line in sys.stdin:
        asked = json.loads(line)
        if "exit" in asked:
            break
        _answer(answers, _obey(asked, run, memory))
    return 0


def _obey(asked: dict[str, Any], run: Run, memory: dict[str, int]) -> dict[str, object]:
    if "run" in asked:
        return {"milliseconds": _turn(run, asked["run"], asked.get("most"), asked.get("lasting", 0.0))}
    if "warmup" in asked:
        for _ in range(asked["warmup"]):
            run()
        return {"done": True}
    return {**memory, "peak": _status("VmHWM")}


def _turn(run: Run, least: int, most: int | None, lasting: float) -> list[float]:
    times, end = list[float](), time.perf_counter() + lasting
    while len(times) < least or (time.perf_counter() < end and (most is None or len(times) < most)):
        times.append(_time(run))
    return times


def _time(run: Run) -> float:
    started = time.perf_counter_ns()
    run()
    return (time.perf_counter_ns() - started) / 1e6


def _private_output() -> TextIO:
    """Return standard output for answers alone: whatever a library writes there goes to standard error."""
    private = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return private


def _answer(answers: TextIO, value: dict[str, Any]) -> None:
    answers.write(json.dumps(value) + "\n")
    answers.flush()


def _open_onnx(order: _Order) -> tuple[Run, dict[str, list[int]]]:
    from normfuse.runtime.onnx_session import open_onnx

    # An idle engine must not spin: the others are measured meanwhile. Within a run it spins as it would elsewhere.
    config = {"session.force_spinning_stop": "1", **order.session_config}
    session = open_onnx(order.path, threads=order.threads, session_config=config)
    feeds = order.feeds([Wanted(port.name, port.shape, port.dtype) for port in session.inputs])
    return lambda: session.run(feeds), _shapes(feeds)


def _open_compiled(order: _Order) -> tuple[Run, dict[str, list[int]]]:
    return _open_torch(order, compiles=True)


def _open_torch(order: _Order, *, compiles: bool = False) -> tuple[Run, dict[str, list[int]]]:
    import torch
    from torch.export import ExportedProgram
    from torch.utils import _pytree as pytree

    from normfuse.loading import load_model

    torch.set_num_threads(order.threads)
    program = load_model(order.path).model
    if not isinstance(program, ExportedProgram):
        raise BadInput("the model is no torch.export archive", where=order.path, expected="what normfuse.save writes")
    module, names = program.module(), [name for name in program.graph_signature.user_inputs if isinstance(name, str)]
    values = {node.name: node.meta["val"] for node in program.graph.nodes if node.name in names}
    feeds = order.feeds([_wanted(name, values[name]) for name in names])
    # The archive knows how its inputs nest (positional, keyword, tuples): what is flat here is put back in place.
    flat = [torch.from_numpy(feeds[name]) for name in names]
    positional, named = pytree.tree_unflatten(flat, program.call_spec.in_spec)

    call = torch.compile(module) if compiles else module

    def run() -> object:
        with torch.inference_mode():
            return call(*positional, **named)

    return run, _shapes(feeds)


def _wanted(name: str, value: Any) -> Wanted:
    shape = tuple(size if isinstance(size, int) else None for size in value.shape)
    return Wanted(name, shape, np.dtype(str(value.dtype).removeprefix("torch.")))


def _shapes(feeds: dict[str, Any]) -> dict[str, list[int]]:
    return {name: list(array.shape) for name, array in feeds.items()}


def _status(field_name: str) -> int:
    """Return a size out of Linux' status of this process in bytes (VmHWM: largest resident size so far).

    Elsewhere the largest resident size stands in for both.
    """
    try:
        for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
            if line.startswith(f"{field_name}:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


if __name__ == "__main__":
    sys.exit(main())
