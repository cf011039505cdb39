"""NNCF's post-training quantization of an ONNX file, as its documentation says; run by an interpreter that has it."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class Images:
    """Random images, made as they are read, as for the other tools."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __iter__(self) -> Iterator[Any]:
        """Yield [1, 3, 224, 224], the same ones each time."""
        import numpy as np

        generator = np.random.default_rng(0)
        for _ in range(self.count):
            yield generator.standard_normal((1, 3, 224, 224), dtype=np.float32)


def main() -> None:
    """Quantize ``sys.argv[1]`` with ``sys.argv[2]`` random images and ``sys.argv[3]`` threads; print the figures."""
    path, count, threads = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    os.environ["OMP_NUM_THREADS"] = threads
    import nncf  # type: ignore[import-not-found]
    import onnx

    before = _status("VmRSS")
    model, data = onnx.load(path), nncf.Dataset(Images(count), lambda image: {"image": image})
    start, cpu = time.perf_counter(), time.process_time()
    nncf.quantize(model, data, subset_size=count, model_type=nncf.ModelType.TRANSFORMER)
    figures = {
        "seconds": time.perf_counter() - start,
        "cpu": time.process_time() - cpu,
        "peak": _status("VmHWM") - before,
        "weights": path.stat().st_size + sum(each.stat().st_size for each in path.parent.glob(f"{path.name}.data")),
    }
    sys.stdout.write(json.dumps(figures) + "\n")


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) * 1024


if __name__ == "__main__":
    main()
