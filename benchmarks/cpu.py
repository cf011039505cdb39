"""``make bench-cpu``: DeiT-S on this CPU, every engine alone in its process, in turns, in one run."""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks.deit import NORMS, deit_small, images
from benchmarks.peers.onnxruntime_static import quantize_u8s8
from benchmarks.plain_export import export_plainly
from normfuse.bench.environment import default_threads, describe_environment
from normfuse.bench.timing import EngineSpec, Schedule, Timing, measure_memory, time_engines
from normfuse.build import check_quantized, write_float, write_quantized
from normfuse.checks import require
from normfuse.cli import render
from normfuse.export.placement import onnx_placement
from normfuse.graph import capture
from normfuse.graph.program import to_program
from normfuse.planning import plan_quantization
from normfuse.recipe import Recipe

SAMPLES = 16
TORCH, PLAIN, OWN_INT8, FOLDED, INT8 = (
    "PyTorch eager",
    "onnxruntime fp32",
    "onnxruntime int8",
    "normfuse fp32",
    "normfuse int8",
)


def main() -> None:
    """Build every engine, measure, print the table and the two ratios that count."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("-o", "--output", type=Path, help="write the figures here as JSON")
    given = parser.parse_args()
    threads = default_threads()
    found: dict[str, Any] = {"environment": describe_environment().as_dict(), "threads": threads}
    with tempfile.TemporaryDirectory(prefix="normfuse-bench-") as folder:
        engines = [engine for norm in NORMS for engine in build(norm, given.layers, Path(folder), threads)]
        for batch in given.batches:
            timings = time_engines(
                engines,
                batch=batch,
                threads=threads,
                schedule=Schedule(rounds=given.rounds),
                progress=render.ShownProgress(),
            )
            memory = {spec.label: measure_memory(spec, batch=batch, threads=threads) for spec in engines}
            found[f"batch {batch}"] = _show(engines, timings, memory, batch, threads)
    if given.output:
        given.output.write_text(json.dumps(found, indent=1) + "\n")


def build(norm: str, layers: int, folder: Path, threads: int) -> list[EngineSpec]:
    """Return the five engines of one variant."""
    label = norm.lower()
    graph = capture(deit_small(norm, layers=layers), [images(2)])
    torch.export.save(to_program(graph), folder / f"{label}.pt2")
    export_plainly(deit_small(norm, layers=layers), images(2), folder / f"{label}_plain.onnx")
    quantize_u8s8(
        folder / f"{label}_plain.onnx",
        folder / f"{label}_own.onnx",
        input_name="image",
        batches=(batch.numpy() for batch in images(SAMPLES).split(2)),
    )
    folded, _ = write_float(graph, folder / f"{label}_folded.onnx")
    placement = onnx_placement(describe_environment().instruction_set)

    def samples() -> Iterator[list[Tensor]]:
        return ([image[None]] for image in images(SAMPLES))

    shown = render.ShownProgress()
    plan = plan_quantization(folded, samples, recipe=Recipe(), placement=placement, total=SAMPLES, progress=shown)
    int8 = write_quantized(plan, folder / f"{label}_int8.onnx", placement=placement)
    int8 = check_quantized(int8, samples, threads=threads)
    require(int8.checks)  # a fast engine that computes something else is no figure
    files = {TORCH: ".pt2", PLAIN: "_plain.onnx", OWN_INT8: "_own.onnx", FOLDED: "_folded.onnx", INT8: "_int8.onnx"}
    config = {INT8: int8.session_config}
    return [
        EngineSpec(
            f"{norm} {name}",
            "torch" if name == TORCH else "onnxruntime",
            folder / f"{label}{end}",
            config.get(name, {}),
        )
        for name, end in files.items()
    ]


def _show(
    engines: list[EngineSpec], timings: dict[str, Timing], memory: dict[str, int], batch: int, threads: int
) -> dict[str, Any]:
    base = f"LN {PLAIN}"
    columns = ("engine", "p50 ms", "p90 ms", "p99 ms", "samples/s", "against fp32", "memory MB", "file MB")
    rows = []
    for spec in engines:
        timing = timings[spec.label]
        size = spec.path.stat().st_size / 1e6
        rows.append(
            (
                spec.label,
                *(f"{value:.2f}" for value in (timing.p50, timing.p90, timing.p99)),
                f"{timing.throughput:.1f}",
                f"{_ratio(timings[base], timing):.2f}x",
                f"{memory[spec.label] / 1e6:.0f}",
                f"{size:.1f}",
            )
        )
    render.table(f"DeiT-S, batch {batch}, {threads} threads", columns, rows)
    ratios = {
        "normfuse int8 UN against onnxruntime's own int8 LN": _ratio(timings[f"LN {OWN_INT8}"], timings[f"UN {INT8}"]),
        "normfuse int8 UN against onnxruntime fp32 UN": _ratio(timings[f"UN {PLAIN}"], timings[f"UN {INT8}"]),
        "normfuse int8 UN against onnxruntime fp32 LN": _ratio(timings[base], timings[f"UN {INT8}"]),
        "normfuse int8 UN against normfuse int8 LN": _ratio(timings[f"LN {INT8}"], timings[f"UN {INT8}"]),
        "normfuse fp32 UN against onnxruntime fp32 UN": _ratio(timings[f"UN {PLAIN}"], timings[f"UN {FOLDED}"]),
    }
    for name, value in ratios.items():
        render.line(f"{name}: {value:.2f}x")
    return {
        "ratios": ratios,
        "engines": {label: {**timing.as_dict(), "peak_bytes": memory[label]} for label, timing in timings.items()},
    }


def _ratio(slow: Timing, fast: Timing) -> float:
    """Return the median of the rounds' ratios: drift of the machine falls on both sides of each."""
    return median(a / b for a, b in zip(slow.rounds, fast.rounds, strict=True))


if __name__ == "__main__":
    main()
