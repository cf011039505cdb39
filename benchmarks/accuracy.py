"""``make bench-accuracy``: what bits and effort cost on the zoo, in one run, mean over seeds."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from statistics import mean, pstdev
from typing import Any, Final

import torch
from torch import Tensor

from examples.zoo.data import make
from examples.zoo.models import MODELS
from examples.zoo.train import WEIGHTS
from normfuse.bench.accuracy import score
from normfuse.bench.environment import default_threads, describe_environment
from normfuse.build import FOLDING, quantize_graph
from normfuse.capturing import capture_model
from normfuse.cli import render
from normfuse.export.placement import onnx_placement
from normfuse.graph import Graph
from normfuse.loading import load_model
from normfuse.progress import Silent
from normfuse.recipe import Recipe

BITS: Final = ("8", "w6a6", "w4a8", "w4a4", "w3a3", "w4a16", "w3a16")
BATCH: Final = 250
OPERANDS: Final = {"maps": False, "all": True}
"""Codes for what linear maps read (the deployable subset), or for the operands of attention's products too."""


def main() -> None:
    """Quantize every model at every width and effort, print a table per model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--bits", nargs="+", default=list(BITS))
    parser.add_argument("--efforts", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--operands", nargs="+", choices=list(OPERANDS), default=list(OPERANDS))
    parser.add_argument("--equalize", action="store_true")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--test", type=int, default=4000)
    parser.add_argument("-o", "--output", type=Path, help="write the figures here as JSON")
    given = parser.parse_args()
    torch.set_num_threads(default_threads())
    found: dict[str, Any] = {"environment": describe_environment().as_dict(), "samples": given.samples}
    for name in given.models:
        found[name] = measure(name, given)
        if given.output:
            given.output.write_text(json.dumps(found, indent=1) + "\n")


def measure(name: str, given: argparse.Namespace) -> dict[str, Any]:
    """Return the score in float and the drop of every setting, in points."""
    graph = capture_model(load_model(WEIGHTS / f"{name}.pt2"), None, None)
    FOLDING.run(graph)
    task = MODELS[name].task
    images, labels = make(task, "test", min(given.test, 360 if task == "digits" else given.test), 0)
    exact = _score(graph, images, labels)
    rows, figures = list[tuple[str, ...]](), dict[str, Any]()
    for operands in given.operands:
        for bits in given.bits:
            drops = {
                effort: _drops(graph, exact, (images, labels), task, bits, effort, operands, given)
                for effort in given.efforts
            }
            figures[f"{bits}, {operands}"] = drops
            cells = [f"{mean(drop):.2f} ± {pstdev(drop):.2f}" for drop in drops.values()]
            rows.append((bits, operands, *cells))
    columns = ("bits", "codes for", *(f"drop, effort {effort}" for effort in given.efforts))
    render.table(f"{name}: {exact:.2f} % in float, {given.samples} samples, {given.seeds} seeds", columns, rows)
    return {"float": exact, "drops": figures}


def _drops(  # noqa: PLR0913, PLR0917 - one cell of the table
    graph: Graph,
    exact: float,
    test: tuple[Tensor, Tensor],
    task: str,
    bits: str,
    effort: int,
    operands: str,
    given: argparse.Namespace,
) -> list[float]:
    """Return the points lost, one figure per seed of samples and learning."""
    drops = []
    for seed in range(given.seeds):
        samples, _ = make(task, "calib", given.samples, seed)
        recipe = Recipe(bits=bits, effort=effort, seed=seed, equalize=given.equalize)
        placement = replace(onnx_placement("avx512_vnni", recipe.precision), attention_operands=OPERANDS[operands])
        quantized = quantize_graph(
            graph,
            lambda samples=samples: ([sample[None]] for sample in samples),  # type: ignore[misc]
            recipe=recipe,
            placement=placement,
            total=given.samples,
            progress=Silent(),
        )
        drops.append(exact - _score(quantized.graph, *test))
    return drops


def _score(graph: Graph, images: Tensor, labels: Tensor) -> float:
    parts = zip(images.split(BATCH), labels.split(BATCH), strict=True)
    batches = (({"image": some.numpy()}, wanted.numpy()) for some, wanted in parts)
    return score(lambda inputs: graph.run(torch.from_numpy(inputs["image"]))[0].numpy(), batches).percent


if __name__ == "__main__":
    main()
