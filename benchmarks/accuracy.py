"""``make bench-accuracy``: what bits and effort cost on the zoo, in one run, mean over seeds."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from multiprocessing import get_context
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
from normfuse.export.placement import TENSORRT, onnx_placement, with_bits
from normfuse.graph import Graph
from normfuse.loading import load_model
from normfuse.planning import plan_quantization
from normfuse.progress import Silent
from normfuse.quant.bits import Bits
from normfuse.quant.placement import Placement
from normfuse.recipe import ActivationCodes, Recipe, WeightCodes

__all__ = ["folded", "held_out", "main", "percent", "percent_of_graph", "quantized", "spread"]

BATCH: Final = 250
SAMPLES: Final = 128
USUAL_OPTIONS: Final = (False, ActivationCodes.STATIC.value, WeightCodes.SYMMETRIC.value)
USUAL: Final = ["glyphs_vit_ln", "glyphs_vit_un", "glyphs_vit_prepbn", "glyphs_resnet_bn", "scenes_segmenter_ln"]


@dataclass(frozen=True, slots=True)
class Setting:
    """One row: how a model is quantized, and the points that it may lose by our own aim."""

    bits: str
    effort: int
    wanted: float | None = None
    samples: int = SAMPLES
    levers: str = ""


SETTINGS: Final = (
    Setting("8", 1, 0.2),
    Setting("8", 0, 0.7, samples=1),
    Setting("w6a6", 1, 0.4),
    Setting("w4a8", 1, 0.7),
    Setting("w4a16", 1, 0.4),
    Setting("w3a16", 1, 1.2),
    Setting("w3a16", 2, 1.2),
    Setting("w4a4", 2, 2.5),
    Setting("w3a3", 2, 8.0),
)

ATTENTION: Final = {"attention_operands": True}
OPERANDS: Final[dict[str, dict[str, bool]]] = {
    "maps": {},
    "all": ATTENTION,
    "tensorrt": {},
    "all-by-head": {**ATTENTION, "head_scales": True},
    "all-logarithmic": {**ATTENTION, "logarithmic_softmax": True},
    "all-by-head-logarithmic": {**ATTENTION, "head_scales": True, "logarithmic_softmax": True},
}
"""Codes for what linear maps read (what onnxruntime deploys), or for the operands of attention's products too.

With ``tensorrt`` it is what TensorRT deploys: eight bits about a zero point of 0, or few-bit weights behind floats. The
last three are for simulation: no engine has such codes.
"""


@dataclass(frozen=True, slots=True)
class Cell:
    """One figure of a table."""

    model: str
    setting: Setting
    operands: str
    seed: int
    test: int
    rotate: bool
    equalize: bool
    activations: ActivationCodes
    weights: WeightCodes


def main() -> None:
    """Quantize every model in every way, print a table per model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=USUAL)
    parser.add_argument("--bits", nargs="+", help="these widths, at all --efforts, in place of the usual rows")
    parser.add_argument("--efforts", nargs="+", type=int, help="of --bits (0 1 2)")
    parser.add_argument("--operands", nargs="+", choices=list(OPERANDS), default=["maps", "all", "tensorrt"])
    parser.add_argument("--rotate", action="store_true")
    parser.add_argument("--equalize", action="store_true")
    parser.add_argument("--levers", action="append", help="of --bits, a row for each, as `normfuse compile --levers`")
    parser.add_argument("--activations", type=ActivationCodes, default=ActivationCodes.STATIC)
    parser.add_argument("--weights", type=WeightCodes, default=WeightCodes.SYMMETRIC)
    parser.add_argument("--samples", type=int, help=f"of --bits ({SAMPLES})")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--test", type=int, default=4000)
    parser.add_argument("--jobs", type=int, default=default_threads(), help="figures made at once, one thread each")
    parser.add_argument("-o", "--output", type=Path, help="write the figures here as JSON")
    given = parser.parse_args()
    settings = _settings(parser, given)
    found: dict[str, Any] = {"environment": describe_environment().as_dict(), "options": _options(given)}
    with ProcessPoolExecutor(given.jobs, mp_context=get_context("spawn")) as pool:
        started = {name: _start(pool, name, settings, given) for name in given.models}
        for name, cells in started.items():
            found[name] = _show(name, {cell: future.result() for cell, future in cells.items()}, settings, given)
            if given.output:
                given.output.write_text(json.dumps(found, indent=1) + "\n")


def _settings(parser: argparse.ArgumentParser, given: argparse.Namespace) -> Sequence[Setting]:
    """Return the rows; what would be ignored is refused."""
    is_usual = given.activations is ActivationCodes.STATIC and given.weights is WeightCodes.SYMMETRIC
    if "tensorrt" in given.operands and not is_usual:
        parser.error("TensorRT has static activations and symmetric weights: leave tensorrt out of --operands")
    if given.bits:
        return tuple(
            Setting(bits, effort, samples=given.samples or SAMPLES, levers=levers)
            for bits in given.bits
            for effort in given.efforts or (0, 1, 2)
            for levers in given.levers or [""]
        )
    if given.efforts or given.samples or given.levers:
        parser.error("--efforts, --samples and --levers are of --bits; the usual rows have their own")
    return SETTINGS


def _options(given: argparse.Namespace) -> dict[str, Any]:
    """Return what all cells share."""
    return {
        "rotate": given.rotate,
        "equalize": given.equalize,
        "activations": given.activations.value,
        "weights": given.weights.value,
    }


def _start(
    pool: ProcessPoolExecutor, name: str, settings: Iterable[Setting], given: argparse.Namespace
) -> dict[Cell, Future[float]]:
    ways = {way: getattr(given, way) for way in ("rotate", "equalize", "activations", "weights")}
    cells = (
        Cell(name, setting, operands, seed, given.test, **ways)
        for setting in settings
        for operands in given.operands
        if _differs(setting, operands, given.operands)
        for seed in range(given.seeds)
    )
    return {cell: pool.submit(points_lost, cell) for cell in cells}


def _differs(setting: Setting, operands: str, beside: list[str]) -> bool:
    """Return whether the column has a figure of its own: weights alone are the same in all, TensorRT has 8 bits."""
    if Bits.parse(setting.bits).is_weight_only:
        return operands == beside[0]
    return operands != "tensorrt" or setting.bits == "8"


def _show(
    name: str, drops: dict[Cell, float], settings: Iterable[Setting], given: argparse.Namespace
) -> dict[str, Any]:
    rows, figures = list[tuple[str, ...]](), dict[str, Any]()
    for setting in settings:
        columns = []
        for operands in given.operands:
            lost = [drop for cell, drop in drops.items() if (cell.setting, cell.operands) == (setting, operands)]
            columns.append(spread(lost, "{:.2f}") if lost else "")
            if lost:
                figures[f"{_described(setting)}, {operands}"] = lost
        wanted = "" if setting.wanted is None else f"{setting.wanted}"
        rows.append((_described(setting), *columns, wanted))
    exact = exact_percent(name, given.test)
    head = ("quantized", *(f"lost, {operands}" for operands in given.operands), "at most")
    unusual = [f"{option} {value}" for option, value in _options(given).items() if value not in USUAL_OPTIONS]
    title = ", ".join([f"{name}: {exact:.2f} % in float", f"mean and deviation of {given.seeds} seeds", *unusual])
    render.table(title, head, rows)
    return {"float": exact, "lost": figures}


def spread(values: Sequence[float], written: str) -> str:
    """Return mean and deviation, each written so; one value has no deviation."""
    shown = [mean(values), pstdev(values)] if len(values) > 1 else list(values)
    return " ± ".join(written.format(value) for value in shown)


def _described(setting: Setting) -> str:
    samples = "one sample" if setting.samples == 1 else f"{setting.samples} samples"
    return ", ".join((setting.bits, f"effort {setting.effort}", samples, *filter(None, [setting.levers])))


def points_lost(cell: Cell) -> float:
    """Return what one way of quantizing loses against float, in points."""
    torch.set_num_threads(1)
    task, setting = MODELS[cell.model].task, cell.setting
    samples, _ = make(task, "calib", setting.samples, cell.seed)
    recipe = Recipe(
        bits=setting.bits,
        effort=setting.effort,
        levers=setting.levers,
        seed=cell.seed,
        rotate=cell.rotate,
        equalize=cell.equalize,
        activations=cell.activations,
        weights=cell.weights,
    )
    graph = quantized(folded(cell.model), samples, recipe, _placement(cell.operands, recipe))
    return exact_percent(cell.model, cell.test) - percent_of_graph(graph, *held_out(task, cell.test))


def _placement(operands: str, recipe: Recipe) -> Placement:
    bits, kinds = recipe.precision, {"activations": recipe.activations, "weights": recipe.weights}
    target = with_bits(TENSORRT, bits) if operands == "tensorrt" else onnx_placement("avx512_vnni", bits, **kinds)
    return replace(target, **OPERANDS[operands])


@cache
def exact_percent(name: str, test: int) -> float:
    """Return the score of the zoo's model in float."""
    return percent_of_graph(folded(name), *held_out(MODELS[name].task, test))


@cache
def folded(name: str) -> Graph:
    """Return the zoo's model, folded, in float."""
    graph = capture_model(load_model(WEIGHTS / f"{name}.pt2"), None, None)
    FOLDING.run(graph)
    return graph


@cache
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
    return plan.simulated(biases_stay_float=placement.biases_stay_float)[0]


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
