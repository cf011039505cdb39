"""``make bench-integers``: what integer-only engines of the zoo lose, weigh, and whether they are their reference."""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.accuracy import BATCH, exact_percent, folded, held_out, percent, spread
from examples.zoo.data import make
from examples.zoo.models import MODELS
from normfuse.bench.environment import describe_environment
from normfuse.cli import render
from normfuse.export.float_tensors import float_tensors
from normfuse.export.onnx import export_onnx
from normfuse.graph import Graph
from normfuse.integer_engine import build_integers
from normfuse.measure import file_bytes
from normfuse.nn import prepare_qat
from normfuse.progress import Silent
from normfuse.quant.integer_forms import GeluForm, NormForm, SoftmaxForm
from normfuse.recipe import Recipe
from normfuse.runtime.onnx_session import OnnxSession, open_onnx

__all__ = ["main"]

SAMPLES: Final = 128
USUAL: Final = [
    *("glyphs_vit_ln", "glyphs_vit_un", "glyphs_vit_prepbn", "glyphs_vit_bn", "glyphs_vit_un_post"),
    *("glyphs_swin_prepbn", "glyphs_resnet_bn", "scenes_segmenter_ln"),
]
COMPARED: Final = 512
"""Samples on which engine and reference have to be equal."""

TUNED, RATE = 64, 1e-5
"""Images of a step of fine-tuning, and the learning rate of the first one; it falls to 0."""

WAYS: Final = ((1, 1), (7, 2), (64, 1))
"""Batch sizes and threads that they are compared with."""


@dataclass(frozen=True, slots=True)
class Found:
    """One engine: points lost, bytes over those of the float file, values that differ from the reference's."""

    lost: float
    share: float
    different: int
    floats: int


def main() -> None:
    """Print a row per model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=USUAL)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=SAMPLES)
    parser.add_argument("--test", type=int, default=4000, help="test images; of scenes a quarter (4096 pixels each)")
    for name, form in (("--norm", NormForm), ("--softmax", SoftmaxForm), ("--gelu", GeluForm)):
        first, *_ = words = [each.value for each in form]
        parser.add_argument(name, choices=words, default=first, help="as of the compiler")
    parser.add_argument("--tune", type=int, default=0, help="steps of fine-tuning (64 images each) before the engine")
    parser.add_argument("--compared", type=int, default=COMPARED)
    parser.add_argument("-o", "--output", type=Path, help="write the figures here as JSON")
    given = parser.parse_args()
    torch.set_num_threads(1)
    figures: dict[str, Any] = {"environment": describe_environment().as_dict()}
    rows = []
    for name in given.models:
        test = given.test // 4 if MODELS[name].task == "scenes" else given.test
        found = [_measure(name, seed, given, test) for seed in range(given.seeds)]
        figures[name] = {field: [getattr(each, field) for each in found] for field in Found.__slots__}
        exact = exact_percent(name, test)
        lost = [each.lost for each in found]
        relative = f"{100 * mean(lost) / exact:.2f} %"
        equal = (
            "same bits" if not any(each.different for each in found) else f"{sum(e.different for e in found)} differ"
        )
        share = f"{mean(each.share for each in found):.4f}"
        rows.append((name, f"{exact:.2f}", spread(lost, "{:.2f}"), relative, share, equal, found[0].floats))
    columns = ("model", "float %", "points lost", "of the score", "of the float file", "reference", "float tensors")
    ways = ", ".join(f"{batch} on {threads}" for batch, threads in WAYS)
    tuned = f"after {given.tune} steps of {TUNED} images, " if given.tune else ""
    forms = f"norms {given.norm}, softmax by {given.softmax}, GELU by {given.gelu}, "
    compared = f"compared on {given.compared} samples (batch {ways} threads)"
    title = f"integers alone, {forms}{tuned}{given.seeds} seeds; {compared}"
    render.table(title, columns, rows)
    if given.output:
        given.output.write_text(json.dumps(figures, indent=1) + "\n")


def _measure(name: str, seed: int, given: argparse.Namespace, test: int) -> Found:
    task = MODELS[name].task
    samples, _ = make(task, "calib", given.samples, seed)
    forms = {"norm": given.norm, "softmax": given.softmax, "gelu": given.gelu}
    recipe = Recipe(integer_only=True, seed=seed).with_options(**forms)
    graph = _tuned(name, recipe, samples, given.tune) if given.tune else folded(name)
    with tempfile.TemporaryDirectory(prefix="normfuse-bench-") as folder:
        exact, path = Path(folder) / "float.onnx", Path(folder) / "integers.onnx"
        export_onnx(folded(name), exact)
        engine = build_integers(
            graph,
            lambda: ([sample[None]] for sample in samples),
            path,
            recipe=recipe,
            total=len(samples),
            threads=1,
            progress=Silent(),
        )
        images, labels = held_out(task, test)
        session = open_onnx(path, threads=1)
        (output,) = engine.graph.output_names
        logits = (_run(session, engine.graph, some) for some in torch.split(images, BATCH))
        return Found(
            lost=exact_percent(name, test) - percent((each[output] for each in logits), labels),
            share=file_bytes(path) / file_bytes(exact),
            different=_different(engine.graph, path, images[: given.compared]),
            floats=len(float_tensors(path)),
        )


def _tuned(name: str, recipe: Recipe, samples: Tensor, steps: int) -> Graph:
    """Return the folded graph after a short training on its integers, towards the labels and the float model."""
    exact = folded(name)
    (image,) = exact.input_names
    training = prepare_qat(exact, {image: samples.numpy()}, recipe=recipe)
    images, labels = make(MODELS[name].task, "train", TUNED * steps, recipe.seed)
    optimizer = torch.optim.Adam(training.parameters(), lr=RATE)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    for some, wanted in zip(torch.split(images, TUNED), torch.split(labels, TUNED), strict=True):
        found = training(some)
        assert isinstance(found, Tensor)
        loss = functional.cross_entropy(found, wanted) + functional.mse_loss(found, exact.run(some)[0])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return training.tuned()


def _run(session: OnnxSession, graph: Graph, images: Tensor) -> dict[str, np.ndarray]:
    (name,) = graph.input_names
    return dict(session.run({name: images.numpy()}))


def _different(graph: Graph, path: Path, images: Tensor) -> int:
    """Return how many outputs differ from the reference's, in any of the ways to run the engine, twice each."""
    parts = torch.split(images, BATCH)
    wanted = np.concatenate([graph.run(some)[0].numpy() for some in parts])
    found = 0
    for batch, threads in WAYS:
        session = open_onnx(path, threads=threads)
        for _ in range(2):
            made = [_run(session, graph, some)[graph.output_names[0]] for some in torch.split(images, batch)]
            found += int((np.concatenate(made) != wanted).sum())
    return found


if __name__ == "__main__":
    main()
