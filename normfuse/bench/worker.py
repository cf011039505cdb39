"""One engine, alone in its process: reads orders on standard input, answers with times and memory."""

from __future__ import annotations

import json
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["main"]

Run = Callable[[], object]


def main() -> None:
    """Open the engine that the first line describes, then obey: run N times, tell memory, end."""
    order = json.loads(sys.stdin.readline())
    run = _open(order)
    _answer({"ready": True})
    for line in sys.stdin:
        order = json.loads(line)
        if "run" in order:
            _answer({"milliseconds": [_time(run) for _ in range(order["run"])]})
        elif "memory" in order:
            _answer({"peak_bytes": _peak()})
        else:
            break


def _time(run: Run) -> float:
    started = time.perf_counter()
    run()
    return (time.perf_counter() - started) * 1e3


def _answer(value: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()


def _open(order: dict[str, Any]) -> Run:
    opened = {"onnxruntime": _open_onnx, "torch": _open_torch}[order["kind"]]
    return opened(Path(order["path"]), order)


def _inputs(specs: list[tuple[str, tuple[int | None, ...], Any]], batch: int) -> dict[str, Any]:
    """Return random inputs, never zeros: normal floats, small integers."""
    generator = np.random.default_rng(0)
    made = {}
    for name, shape, dtype in specs:
        sizes = [batch if index == 0 and size is None else size or 1 for index, size in enumerate(shape)]
        is_float = np.issubdtype(dtype, np.floating)
        values = generator.standard_normal(sizes) if is_float else generator.integers(0, 2, sizes)
        made[name] = values.astype(dtype)
    return made


def _open_onnx(path: Path, order: dict[str, Any]) -> Run:
    from normfuse.runtime.onnx_session import open_onnx

    # An idle engine must not spin: the others are measured meanwhile.
    config = {"session.force_spinning_stop": "1", **order["session_config"]}
    session = open_onnx(path, threads=order["threads"], session_config=config)
    feeds = _inputs([(port.name, port.shape, port.dtype) for port in session.inputs], order["batch"])
    return lambda: session.run(feeds)


def _open_torch(path: Path, order: dict[str, Any]) -> Run:
    import torch

    torch.set_num_threads(order["threads"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.load(path)
        module = program.module()
    names = [node for node in program.graph_signature.user_inputs if isinstance(node, str)]
    values = {node.name: node.meta["val"] for node in program.graph.nodes if node.name in names}
    specs = [
        (
            name,
            tuple(size if isinstance(size, int) else None for size in values[name].shape),
            np.dtype(str(values[name].dtype).removeprefix("torch.")),
        )
        for name in names
    ]
    inputs = [torch.from_numpy(value) for value in _inputs(specs, order["batch"]).values()]

    def run() -> object:
        with torch.inference_mode():
            return module(*inputs)

    return run


def _peak() -> int:
    """Return the largest resident size of this process so far, in bytes."""
    try:
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


if __name__ == "__main__":
    main()
