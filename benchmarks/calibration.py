"""``make bench-calibration``: time and memory of calibrating to 8 bits, every tool alone in its process."""

from __future__ import annotations

import argparse
import gc
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, Final

import torch
from torch import Tensor, nn

from benchmarks.deit import Logits
from benchmarks.peers.environment import PeerMissing, python_of
from benchmarks.plain_export import export_plainly
from benchmarks.random_weights import randomized_norms
from normfuse.bench.environment import default_threads, describe_environment
from normfuse.cli import render

SHAPES: Final = {"deit-s": 384, "vit-b": 768}
"""The width of a ViT of 12 blocks and 197 tokens, heads of 64."""

OURS: Final = {
    "normfuse, effort 1": {"effort": 1},
    "normfuse, effort 0": {"effort": 0},
    "normfuse, min-max": {"effort": 0, "calibration": "min-max"},
}
PEERS: Final = {
    "onnxruntime, MinMax": "MinMax",
    "onnxruntime, Entropy": "Entropy",
    "onnxruntime, Percentile": "Percentile",
}
NNCF: Final = "NNCF"
NNCF_WORKER: Final = Path(__file__).with_name("peers") / "nncf_calibration.py"


def main() -> None:
    """Measure every tool in a fresh process, print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=list(SHAPES), default="deit-s")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--bits", default="8", help="of normfuse alone; peers have 8")
    parser.add_argument("--tools", nargs="+", default=[*OURS, *PEERS, NNCF])
    parser.add_argument("--threads", type=int, default=default_threads())
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("-o", "--output", type=Path, help="write the figures here as JSON")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if given.worker:
        figures = _ours(given) if given.worker in OURS else _onnxruntime(given)
        sys.stdout.write(json.dumps(figures) + "\n")
        return
    found: dict[str, Any] = {"environment": describe_environment().as_dict(), "samples": given.samples}
    with tempfile.TemporaryDirectory(prefix="normfuse-bench-") as folder:
        model = Path(folder) / "model.onnx"
        if any(tool not in OURS for tool in given.tools):
            export_plainly(_model(SHAPES[given.shape], 12), torch.randn(2, 3, 224, 224), model)
        runs = dict[str, list[dict[str, float]]]()
        for _ in range(given.runs):  # in turns: drift of the machine falls on all
            for tool in given.tools:
                runs.setdefault(tool, []).extend(_run(tool, given, model))
    found["runs"] = {tool: each for tool, each in runs.items() if each}
    rows = [(tool, *_cells(each)) for tool, each in found["runs"].items()]
    columns = ("tool", "seconds", "of one core", "peak MB", "of fp32 weights")
    render.table(f"{given.shape}, {given.samples} samples, {given.threads} threads", columns, rows)
    if given.output:
        given.output.write_text(json.dumps(found, indent=1) + "\n")


def _cells(runs: list[dict[str, float]]) -> list[str]:
    middle = {name: median(run[name] for run in runs) for name in runs[0]}
    return [
        f"{middle['seconds']:.1f}",
        f"{middle['cpu']:.1f}",
        f"{middle['peak'] / 1e6:.0f}",
        f"{middle['peak'] / middle['weights']:.2f}x",
    ]


def _run(tool: str, given: argparse.Namespace, model: Path) -> list[dict[str, float]]:
    common = ["--shape", given.shape, "--samples", str(given.samples), "--bits", given.bits, "--model", str(model)]
    common += ["--threads", str(given.threads)]
    command = [sys.executable, "-m", "benchmarks.calibration", "--worker", tool, *common]
    if tool == NNCF:
        try:
            python = python_of("nncf", NNCF_WORKER.with_name("nncf.txt"))
        except PeerMissing as missing:
            render.line(f"NNCF: skipped, {missing}")
            return []
        # Without -P the script's folder comes first, and nncf.py beside it is taken for NNCF.
        command = [str(python), "-P", str(NNCF_WORKER), str(model), str(given.samples), str(given.threads)]
    bound = partial(_bind, given.threads)
    ended = subprocess.run(command, capture_output=True, text=True, check=False, preexec_fn=bound)
    if ended.returncode:
        last = (ended.stderr.strip().splitlines() or ["no message"])[-1]
        render.line(f"{tool}: skipped, its process ended with {ended.returncode}: {last}")
        return []
    return [json.loads(ended.stdout.splitlines()[-1])]


def _bind(threads: int) -> None:
    """Leave the process so many cores: a thread count that onnxruntime's own calibration cannot ignore."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])


def _ours(given: argparse.Namespace) -> dict[str, float]:
    """Capture and fold, then measure what plans and writes the quantizers; memory counts the folded weights too.

    What is counted is the highest resident size less that of the process after all imports and a small model quantized
    before; samples are made one by one, as they are read from files.
    """
    small, width = _folded(64, 1), SHAPES[given.shape]
    _quantize(small, given, count=2)
    gc.collect()
    before = _status("VmRSS")
    graph = _folded(width, 12)
    gc.collect()
    _forget_peak()
    start, cpu = time.perf_counter(), time.process_time()
    _quantize(graph, given, count=given.samples)
    return {
        "seconds": time.perf_counter() - start,
        "cpu": time.process_time() - cpu,
        "peak": _status("VmHWM") - before,
        "weights": graph.constant_bytes(),
    }


def _folded(width: int, layers: int) -> Any:
    from normfuse.build import FOLDING
    from normfuse.graph import capture

    graph = capture(_model(width, layers), [torch.randn(2, 3, 224, 224)])
    FOLDING.run(graph)
    return graph


def _quantize(graph: Any, given: argparse.Namespace, *, count: int) -> None:
    from normfuse.export.placement import onnx_placement
    from normfuse.planning import plan_quantization
    from normfuse.progress import Silent
    from normfuse.recipe import Recipe

    recipe = Recipe(bits=given.bits).with_options(**OURS[given.worker])
    placement = onnx_placement(describe_environment().instruction_set, recipe.precision)
    plan_quantization(
        graph,
        lambda: ([image] for image in _images(count)),
        recipe=recipe,
        placement=placement,
        total=count,
        progress=Silent(),
    ).simulated()


def _onnxruntime(given: argparse.Namespace) -> dict[str, float]:
    """Measure ``quantize_static`` on a model that was pre-processed, single samples; memory counts its weights."""
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    from benchmarks.peers.onnxruntime_static import Reader

    logging.getLogger().setLevel(logging.ERROR)
    ready = given.model.with_name("ready.onnx")
    if not ready.exists():
        quant_pre_process(str(given.model), str(ready), skip_symbolic_shape=True)
        gc.collect()
    before = _status("VmRSS")
    _forget_peak()
    start, cpu = time.perf_counter(), time.process_time()
    quantize_static(
        str(ready),
        str(given.model.with_name("quantized.onnx")),
        Reader("image", (image.numpy() for image in _images(given.samples))),
        quant_format=QuantFormat.QDQ,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        per_channel=True,
        calibrate_method=CalibrationMethod[PEERS[given.worker]],
    )
    return {
        "seconds": time.perf_counter() - start,
        "cpu": time.process_time() - cpu,
        "peak": _status("VmHWM") - before,
        "weights": ready.stat().st_size,
    }


def _model(width: int, layers: int) -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    shape = ViTConfig(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        intermediate_size=4 * width,
        num_labels=1000,
    )
    return randomized_norms(Logits(ViTForImageClassification(shape)))


def _images(count: int) -> Iterator[Tensor]:
    """Yield random images, [1, 3, 224, 224], the same in every run."""
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(1, 3, 224, 224, generator=generator) for _ in range(count))


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) * 1024


def _forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # VmHWM starts again from the present size


if __name__ == "__main__":
    main()
