"""``make bench-peers``: the accuracy of other tools on the same model, samples and test images as normfuse's."""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from benchmarks.accuracy import BATCH, folded, held_out, percent, quantized, spread
from benchmarks.peers.calling import PEERS, Peer, PeerMissing, ask
from benchmarks.peers.order import Order
from benchmarks.plain_export import export_plainly
from examples.zoo.data import make
from examples.zoo.models import MODELS
from examples.zoo.train import WEIGHTS
from normfuse.bench.accuracy import Array
from normfuse.bench.environment import default_threads, describe_environment
from normfuse.cli import render
from normfuse.errors import NormfuseError
from normfuse.export.placement import onnx_placement
from normfuse.graph import Graph
from normfuse.loading import load_model
from normfuse.quant.bits import Bits
from normfuse.recipe import Recipe

CHOSEN: Final = ("glyphs_vit_ln", "glyphs_vit_un", "glyphs_vit_prepbn", "glyphs_resnet_bn", "scenes_segmenter_ln")

MAPS: Final = "inputs and weights of linear maps and convolutions; outputs and sums of convolutions"
OPERANDS: Final = "inputs and weights of linear maps and convolutions, all operands of products of activations"
OURS: Final[dict[str, dict[str, dict[str, Any]]]] = {
    "8": {MAPS: {}, "inputs and weights of linear maps and convolutions": {"convolution_outputs": False}},
    "w4a4": {
        f"{OPERANDS}, the image too": {
            "attention_operands": True,
            "convolution_outputs": False,
            "model_input": None,
        },
        f"{OPERANDS}, image at 8 bits": {"attention_operands": True, "convolution_outputs": False},
    },
}
"""By bits and by what has codes: how the placement differs from the deployable one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One way of one tool: by seed points lost, the logits' error and seconds, or why there are none.

    The error is the squared difference from the float logits over their squares, in per mille: accuracy counts the few
    images that change sides, the error all of them.
    """

    tool: str
    bits: str
    setting: str
    tensors: str = ""
    lost: tuple[float, ...] = ()
    errors: tuple[float, ...] = ()
    seconds: tuple[float, ...] = ()
    missing: str = ""

    def cells(self) -> tuple[str, ...]:
        """Return the row as text."""
        name = f"{self.tool}, {self.setting}"
        if self.missing:
            return (name, self.bits, f"skipped: {self.missing}", "", "", "")
        figures = spread(self.lost, "{:.2f}"), spread(self.errors, "{:.3g}"), f"{mean(self.seconds):.0f}"
        return (name, self.bits, self.tensors, *figures)


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """What all tools get: one model, its samples by seed, its test images, and how well it does in float."""

    model: str
    graph: Graph
    folder: Path
    seeds: int
    samples: tuple[Tensor, ...]
    images: Tensor
    labels: Tensor
    wanted: Array
    exact: float

    def judged(self, logits: Array) -> tuple[float, float]:
        """Return points lost and the logits' error in per mille."""
        parts = (logits[at : at + BATCH] for at in range(0, len(logits), BATCH))
        difference, size = np.square(logits - self.wanted, dtype=np.float64), np.square(self.wanted, dtype=np.float64)
        return self.exact - percent(parts, self.labels), 1000 * float(difference.sum() / size.sum())


def main() -> None:
    """Quantize every model with every tool, print a table per model."""
    given = _arguments()
    torch.set_num_threads(default_threads())
    found: dict[str, Any] = {"environment": describe_environment().as_dict(), "samples": given.samples}
    for name in given.models:
        with tempfile.TemporaryDirectory(prefix="normfuse-peers-") as folder:
            trial = prepare(name, Path(folder), samples=given.samples, seeds=given.seeds, test=given.test)
            rows = list[Row]()
            for row in measure(trial, given.bits, given.peers, given.efforts):
                rows.append(row)
                render.talk("  ".join(cell for cell in row.cells() if cell))
        title = f"{name}: {trial.exact:.2f} % in float, {given.samples} samples, {len(trial.images)} test images"
        render.table(
            title,
            ("tool", "bits", "codes for", "points lost", "error of logits, ‰", "s"),
            [row.cells() for row in rows],
        )
        found[name] = {"float": trial.exact, "rows": [asdict(row) for row in rows]}
        if given.output:
            given.output.write_text(json.dumps(found, indent=1) + "\n")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(CHOSEN))
    parser.add_argument("--peers", nargs="*", choices=list(PEERS), default=list(PEERS))
    parser.add_argument("--bits", nargs="+", choices=list(OURS), default=list(OURS))
    parser.add_argument("--efforts", nargs="*", type=int, choices=(0, 1, 2), default=[1, 2], help="of normfuse")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--test", type=int, default=4000)
    parser.add_argument("-o", "--output", type=Path, help="write the figures here as JSON")
    return parser.parse_args()


def prepare(name: str, folder: Path, *, samples: int, seeds: int, test: int) -> Trial:
    """Return the trial of a zoo model, with the files that peers read in ``folder``."""
    task, graph = MODELS[name].task, folded(name)
    images, labels = held_out(task, test)
    parts = tuple(make(task, "calib", samples, seed)[0] for seed in range(seeds))
    np.savez(folder / "test.npz", image=images.numpy())
    for seed, some in enumerate(parts):
        np.savez(folder / f"samples{seed}.npz", image=some.numpy())
    model = load_model(WEIGHTS / f"{name}.pt2").model
    assert isinstance(model, torch.export.ExportedProgram)
    export_plainly(model, parts[0][:2], folder / "float.onnx")
    wanted = logits_of(graph, images)
    return Trial(
        model=name,
        graph=graph,
        folder=folder,
        seeds=seeds,
        samples=parts,
        images=images,
        labels=labels,
        wanted=wanted,
        exact=percent((wanted[at : at + BATCH] for at in range(0, len(wanted), BATCH)), labels),
    )


def logits_of(graph: Graph, images: Tensor) -> Array:
    """Return the logits of a graph for many images."""
    return np.concatenate([graph.run(some)[0].numpy() for some in torch.split(images, BATCH)])


def measure(trial: Trial, bits: list[str], peers: list[str], efforts: list[int]) -> Iterator[Row]:
    """Yield a row for each way of each tool, ours first."""
    for width in bits:
        for tensors, change in OURS[width].items():
            for effort in efforts:
                yield ours(trial, width, effort, tensors, change)
        for name in peers:
            for setting in PEERS[name].settings.get(width, ()):
                yield theirs(trial, name, PEERS[name], width, setting)


def ours(trial: Trial, bits: str, effort: int, tensors: str, change: dict[str, Any]) -> Row:
    """Return what normfuse loses."""

    def lose(seed: int) -> tuple[tuple[float, float], float, str]:
        recipe = Recipe(bits=bits, effort=effort, seed=seed)
        placement = replace(onnx_placement("avx512_vnni", recipe.precision), **change)
        started = time.perf_counter()
        simulation = quantized(trial.graph, trial.samples[seed], recipe, placement)
        seconds = time.perf_counter() - started
        return trial.judged(logits_of(simulation, trial.images)), seconds, tensors

    return _over_seeds(Row(tool="normfuse", bits=bits, setting=f"effort {effort}"), trial.seeds, lose)


def theirs(trial: Trial, name: str, peer: Peer, bits: str, setting: str) -> Row:
    """Return what a peer loses, scored here, or why it could not be asked."""
    width = Bits.parse(bits)

    def lose(seed: int) -> tuple[tuple[float, float], float, str]:
        with tempfile.TemporaryDirectory(dir=trial.folder) as output:
            order = Order(
                model=trial.model,
                archive=str(WEIGHTS / f"{trial.model}.pt2"),
                onnx=str(trial.folder / "float.onnx"),
                weight_bits=width.weight,
                activation_bits=width.activation,
                setting=setting,
                samples=str(trial.folder / f"samples{seed}.npz"),
                test=str(trial.folder / "test.npz"),
                output=output,
                seed=seed,
            )
            logits, answer = ask(name, peer, order)
        return trial.judged(logits), answer.seconds, answer.tensors

    return _over_seeds(Row(tool=name, bits=bits, setting=setting), trial.seeds, lose)


def _over_seeds(row: Row, seeds: int, lose: Callable[[int], tuple[tuple[float, float], float, str]]) -> Row:
    try:
        judged, seconds, tensors = zip(*(lose(seed) for seed in range(seeds)), strict=True)
    except (PeerMissing, NormfuseError) as problem:
        return replace(row, missing=str(problem).splitlines()[0])
    lost, errors = zip(*judged, strict=True)
    return replace(row, lost=lost, errors=errors, seconds=seconds, tensors=tensors[0])


if __name__ == "__main__":
    main()
