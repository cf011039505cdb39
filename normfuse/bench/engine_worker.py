"""Runs and times TensorRT engines, in a process of its own: ``python -m normfuse.bench.engine_worker REQUEST.json``.

An engine is native code and can end its process. Engines of one request are measured in turns, in trtexec's terms.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from normfuse.bench.cuda_graph import recorded
from normfuse.bench.gpu_device import describe_device, device_state
from normfuse.bench.gpu_timing import GpuSchedule, Turn, summary, take_turn
from normfuse.bench.timing import turn_order
from normfuse.errors import NormfuseError
from normfuse.runtime.engine_session import EngineSession, open_engine

__all__ = ["main"]

PLAIN, GRAPH = "plain", "graph"


@dataclass(slots=True, kw_only=True)
class _Way:
    """An engine run one way: what enqueues an inference, and the turns it has taken."""

    run: Callable[[], object]
    turns: list[Turn] = field(default_factory=list)


def main(request_file: str) -> None:
    """Do what a request says and write the answer beside it; what ``normfuse.errors`` knows is an answer too."""
    request = json.loads(Path(request_file).read_text(encoding="utf-8"))
    try:
        answer = _measured(request)
    except NormfuseError as error:
        told = {name: getattr(error, name) for name in ("what", "where", "expected", "hint")}
        answer = {"error": {"kind": type(error).__name__, **told}}
    Path(request["answer"]).write_text(json.dumps(answer), encoding="utf-8")


def _measured(request: dict[str, Any]) -> dict[str, Any]:
    device = torch.device(request["device"])
    schedule = GpuSchedule(**request["schedule"])
    with _stream(device):
        sessions = {each["label"]: _opened(each, request, device) for each in request["engines"]}
        engines = [_computed(each, sessions[each["label"]]) for each in request["engines"]]
        ways = dict[str, _Way]()
        for each in engines:
            ways |= _ways(each, sessions[each["label"]], device)
        states = []
        for index, label in enumerate(turn_order(list(ways), schedule.rounds), start=1):
            ways[label].turns.append(take_turn(ways[label].run, device, schedule))
            if index % len(ways) == 0 and (state := device_state(device)) is not None:
                states.append(state)
    for each in engines:
        for way in (PLAIN, GRAPH):
            found = ways.get(_name(each["label"], way))
            each[way] = summary(found.turns) if found else None
    return {"engines": engines, "device": describe_device(device), "states": states}


def _stream(device: torch.device) -> AbstractContextManager[object]:
    """Return a stream of its own: on the default one TensorRT waits after every inference."""
    return torch.cuda.stream(torch.cuda.Stream(device)) if device.type == "cuda" else nullcontext()


def _opened(asked: dict[str, Any], request: dict[str, Any], device: torch.device) -> EngineSession:
    onnx = None if asked["onnx"] is None else Path(asked["onnx"])
    engine = Path(asked["engine"])
    session = open_engine(engine, request["module"], device=device, onnx=onnx, trust=request["trust"])
    session.give({name: np.load(file, allow_pickle=False) for name, file in asked["inputs"].items()})
    return session


def _computed(asked: dict[str, Any], session: EngineSession) -> dict[str, Any]:
    """Run once and keep the outputs."""
    session.enqueue()
    files = {}
    for index, (name, array) in enumerate(session.outputs().items()):
        place = Path(asked["outputs"]) / f"output_{index}.npy"
        np.save(place, array, allow_pickle=False)
        files[name] = str(place)
    return {"label": asked["label"], "outputs": files, "no_graph": ""}


def _ways(found: dict[str, Any], session: EngineSession, device: torch.device) -> dict[str, _Way]:
    """Return the plain way and the one by a CUDA graph, if there is one; else ``no_graph`` says why."""
    ways = {_name(found["label"], PLAIN): _Way(run=session.enqueue)}
    if device.type != "cuda":
        found["no_graph"] = "there are no CUDA graphs without a GPU"
    elif not session.is_recordable:
        found["no_graph"] = "the library says that the engine cannot be recorded"
    else:
        try:
            ways[_name(found["label"], GRAPH)] = _Way(run=recorded(session.enqueue))
        except (RuntimeError, NormfuseError) as error:  # PyTorch's and ours, where an engine waits for the host
            found["no_graph"] = f"the engine cannot be recorded: {error}"
    return ways


def _name(label: str, way: str) -> str:
    return f"{label}, {way}"


if __name__ == "__main__":
    main(sys.argv[1])
