"""``make bench-fold``: what folding alone gains, unfolded against folded, each engine alone in its process."""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from statistics import median
from typing import Any, Final

import torch

from benchmarks.deit import NORMS, deit_small, images
from benchmarks.swin import swin_tiny
from normfuse.bench.environment import default_threads, describe_environment
from normfuse.bench.memory import memory_use
from normfuse.bench.timing import Schedule, Timing, time_engines
from normfuse.bench.worker_process import EngineSpec
from normfuse.cli import render
from normfuse.export.onnx import export_onnx
from normfuse.folding import FoldOptions, fold
from normfuse.graph import Graph, capture
from normfuse.graph.program import to_program
from normfuse.passes.presets import AFFINES, CANONICAL, LOWER, LayerNorms, folds
from normfuse.pipeline import Pipeline

SHAPES: Final = {"DeiT-S": deit_small, "Swin-T": swin_tiny}
RUNTIMES: Final = ("torch", "torch.compile", "onnxruntime")
UNFOLDED, FOLDED = "unfolded", "folded"


def main() -> None:
    """Build every engine, measure shape by shape and runtime by runtime, print tables and ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--runtimes", nargs="+", choices=RUNTIMES, default=list(RUNTIMES))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("-o", "--output", type=Path, help="write the figures here as JSON")
    given = parser.parse_args()
    threads = default_threads()
    found: dict[str, Any] = {"environment": describe_environment().as_dict(), "threads": threads, "batch": given.batch}
    with tempfile.TemporaryDirectory(prefix="normfuse-bench-") as folder:
        for shape in given.shapes:
            for norm in NORMS:
                build(shape, norm, Path(folder))
            for runtime in given.runtimes:
                found[f"{shape}, {runtime}"] = measure(shape, runtime, Path(folder), given.batch, given.rounds, threads)
    if given.output:
        given.output.write_text(json.dumps(found, indent=1) + "\n")


def build(shape: str, norm: str, folder: Path) -> None:
    """Write the model as it is and folded, for PyTorch and for onnxruntime.

    For onnxruntime both go the same way, so that only the fold differs; LN keeps its kind (layer norm stays).
    """
    original = capture(SHAPES[shape](norm), [images(2)])
    torch.export.save(to_program(original), place(folder, shape, norm, UNFOLDED, ".pt2"))
    folded = fold(to_program(original), options=FoldOptions(layer_norms=LayerNorms.KEEP))
    torch.export.save(to_program(folded.graph), place(folder, shape, norm, FOLDED, ".pt2"))
    for state, phases in ((UNFOLDED, ()), (FOLDED, (AFFINES, folds(), LOWER))):
        graph: Graph = original.copy()
        Pipeline(phases=(CANONICAL, *phases)).run(graph)
        export_onnx(graph, place(folder, shape, norm, state, ".onnx"))


def place(folder: Path, shape: str, norm: str, state: str, end: str) -> Path:
    """Return the file of one variant."""
    return folder / f"{shape}-{norm}-{state}{end}"


def measure(shape: str, runtime: str, folder: Path, batch: int, rounds: int, threads: int) -> dict[str, Any]:
    """Time the six variants in turns and show them."""
    end = ".onnx" if runtime == "onnxruntime" else ".pt2"
    engines = [
        EngineSpec(f"{norm} {state}", runtime, place(folder, shape, norm, state, end))
        for norm in NORMS
        for state in (UNFOLDED, FOLDED)
    ]
    schedule = Schedule(rounds=rounds)
    timings = time_engines(engines, batch=batch, threads=threads, schedule=schedule, progress=render.ShownProgress())
    memory = {spec.label: _activations(spec, batch, threads) for spec in engines}
    base = f"LN {UNFOLDED}"
    rows = [
        (
            label,
            f"{timing.p50:.2f}",
            f"{_ratio(timings[f'{label.split()[0]} {UNFOLDED}'], timing):.2f}x",
            f"{_ratio(timings[base], timing):.2f}x",
            f"{memory[label] / 1e6:.1f}",
            f"{memory[label] / memory[base]:.2f}",
        )
        for label, timing in timings.items()
    ]
    columns = ("variant", "p50 ms", "against itself unfolded", "against LN", "activations MB", "of LN")
    render.table(f"{shape}, {runtime}, batch {batch}, {threads} threads", columns, rows)
    return {label: {**timing.as_dict(), "activations": memory[label]} for label, timing in timings.items()}


def _activations(spec: EngineSpec, batch: int, threads: int) -> int:
    """Return how much the process grows when it runs, in bytes."""
    use = memory_use(spec, batch=batch, threads=threads)
    return use.peak - use.after_load


def _ratio(slow: Timing, fast: Timing) -> float:
    """Return the median of the rounds' ratios: drift of the machine falls on both sides of each."""
    return median(a / b for a, b in zip(slow.rounds, fast.rounds, strict=True))


if __name__ == "__main__":
    main()
