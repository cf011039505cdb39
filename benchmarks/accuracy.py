"""``make bench-accuracy``: what bits and effort cost on the zoo, in one run, mean over seeds."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from statistics import mean, pstdev
from typing import Any, Final

import torch
from torch import Tensor

from examples.zoo.data import make
from examples.zoo.models import MODELS
from examples.zoo.train import WEIGHTS
from normfuse.bench.accuracy import Array, score
from normfuse.bench.environment import default_threads, describe_environment
from normfuse.build import FOLDING
from normfuse.capturing import capture_model
from normfuse.cli import render
from normfuse.export.placement import onnx_placement
from normfuse.graph import Graph
from normfuse.loading import load_model
from normfuse.planning import plan_quantization
from normfuse.progress import Silent
from normfuse.quant.placement import Placement
from normfuse.recipe import ActivationCodes, Recipe, WeightCodes

__all__ = ["folded", "held_out", "main", "percent", "percent_of_graph", "quantized"]

BITS: Final = ("8", "w6a6", "w4a8", "w4a4", "w3a3", "w4a16", "w3a16")
BATCH: Final = 250
ATTENTION: Final = {"attention_operands": True}
OPERANDS: Final[dict[str, dict[str, bool]]] = {
    "maps": {},
    "all": ATTENTION,
    "all-by-head": {**ATTENTION, "head_scales": True},
    "all-logarithmic": {**ATTENTION, "logarithmic_softmax": True},
    "all-by-head-logarithmic": {**ATTENTION, "head_scales": True, "logarithmic_softmax": True},
}
"""Codes for what linear maps read (the deployable subset), or for the operands of attention's products too.

The last three are for simulation: no engine has such codes.
"""


def main() -> None:
    """Quantize every model at every width and effort, print a table per model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--bits", nargs="+", default=list(BITS))
    parser.add_argument("--efforts", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--operands", nargs="+", choices=list(OPERANDS), default=["maps", "all"])
    parser.add_argument("--equalize", action="store_true")
    parser.add_argument("--activations", type=ActivationCodes, default=ActivationCodes.STATIC)
    parser.add_argument("--weights", type=WeightCodes, default=WeightCodes.SYMMETRIC)
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
    graph, task = folded(name), MODELS[name].task
    images, labels = held_out(task, given.test)
    exact = percent_of_graph(graph, images, labels)
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
        kinds = {"activations": given.activations, "weights": given.weights}
        recipe = Recipe(bits=bits, effort=effort, seed=seed, equalize=given.equalize, **kinds)
        placement = replace(onnx_placement("avx512_vnni", recipe.precision, **kinds), **OPERANDS[operands])
        drops.append(exact - percent_of_graph(quantized(graph, samples, recipe, placement), *test))
    return drops


def folded(name: str) -> Graph:
    """Return the zoo's model, folded, in float."""
    graph = capture_model(load_model(WEIGHTS / f"{name}.pt2"), None, None)
    FOLDING.run(graph)
    return graph


def held_out(task: str, count: int) -> tuple[Tensor, Tensor]:
    """Return ``count`` test images, or as many as there are, and their labels."""
    return make(task, "test", min(count, 360 if task == "digits" else count), 0)


def quantized(graph: Graph, samples: Tensor, recipe: Recipe, placement: Placement) -> Graph:
    """Return the simulation of the folded ``graph``, calibrated and learned on ``samples``."""
    plan = plan_quantization(
        graph,
        lambda: ([sample[None]] for sample in samples),
        recipe=recipe,
        placement=placement,
        total=len(samples),
        progress=Silent(),
    )
    return plan.simulated()[0]


def percent_of_graph(graph: Graph, images: Tensor, labels: Tensor) -> float:
    """Return the score of a graph in percent."""
    return percent((graph.run(some)[0].numpy() for some in torch.split(images, BATCH)), labels)


def percent(logits: Iterable[Array], labels: Tensor) -> float:
    """Return the score of logits, in parts of ``BATCH`` images, in percent: top-1, or mean IoU for maps of labels."""
    parts = zip(logits, torch.split(labels, BATCH), strict=True)
    batches = (({"logits": some}, wanted.numpy()) for some, wanted in parts)
    return score(lambda inputs: inputs["logits"], batches).percent


if __name__ == "__main__":
    main()
