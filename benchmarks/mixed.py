"""``make bench-mixed``: bits by every score at one budget and one quantizer, on the zoo, mean over seeds."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import mean
from typing import Any, Final

import torch
from torch import Tensor

from benchmarks.accuracy import BATCH, exact_percent, folded, held_out, percent, spread
from examples.zoo.data import make
from examples.zoo.models import MODELS
from normfuse.bench.environment import default_threads, describe_environment
from normfuse.cli import render
from normfuse.export.placement import onnx_placement
from normfuse.graph import Graph
from normfuse.passes.place_quantizers import PlaceQuantizers
from normfuse.pipeline import Fact, Phase, Pipeline
from normfuse.precision import Quantization, chunked, refine_blockwise, refinements, refinements_at_once
from normfuse.precision.simulation import Simulation
from normfuse.progress import Silent
from normfuse.quant.bits import MOST, Bits
from normfuse.quant.levers import Effort, Levers
from normfuse.quant.score_method import DEFAULT_SCORE, ScoreMethod, scores_called
from normfuse.sensitivity.choosing import choose, rounded
from normfuse.sensitivity.methods import score
from normfuse.sensitivity.sensitivity import Sensitivity
from normfuse.sensitivity.subject import Subject, ranges_by_width
from normfuse.sensitivity.units import BOPS, WEIGHT_BITS, Member, bits_by_map, members_of, options, use_of

__all__ = ["main"]

WIDTHS: Final = (2, 3, 4, 5, 6, 8)
SAMPLES, SCORED, CHUNK = 128, 64, 16
USUAL: Final = ["glyphs_vit_ln", "glyphs_vit_un", "glyphs_vit_prepbn", "glyphs_resnet_bn", "scenes_segmenter_ln"]
MATTERS: Final = 0.3
"""Points that uniform bits lose where mixed ones should lose less."""

placement_of = partial(onnx_placement, "avx512_vnni")


@dataclass(frozen=True, slots=True)
class Budget:
    """One row: what uniform bits use, of weights alone or of weights and activations."""

    name: str
    bits: Bits
    resource: str

    @property
    def activation_widths(self) -> tuple[int, ...]:
        """The widths that activations may have."""
        return WIDTHS if self.resource == BOPS else (MOST,)


BUDGETS: Final = (
    Budget("3 bits per weight, A8", Bits(3, 8), WEIGHT_BITS),
    Budget("4 bits per weight, A8", Bits(4, 8), WEIGHT_BITS),
    Budget("5 bits per weight, A8", Bits(5, 8), WEIGHT_BITS),
    Budget("BOPs of W4A4", Bits(4, 4), BOPS),
    Budget("BOPs of W6A6", Bits(6, 6), BOPS),
)


@dataclass(frozen=True, slots=True)
class Cell:
    """All scores of one model and seed."""

    model: str
    seed: int
    effort: int
    test: int
    methods: tuple[ScoreMethod, ...]


def main() -> None:
    """Print a table per model, then how the default stands against uniform bits and the best single score."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=USUAL)
    parser.add_argument(
        "--methods", nargs="+", type=ScoreMethod, default=list(ScoreMethod), help="beside the default's"
    )
    parser.add_argument("--effort", type=int, choices=(0, 1, 2), default=1)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--test", type=int, default=4000, help="test images; of scenes a quarter (4096 pixels each)")
    parser.add_argument("--jobs", type=int, default=default_threads(), help="models made at once, one thread each")
    parser.add_argument("-o", "--output", type=Path, help="write the figures here as JSON")
    given = parser.parse_args()
    found: dict[str, Any] = {"environment": describe_environment().as_dict(), "effort": given.effort}
    with ProcessPoolExecutor(given.jobs, mp_context=get_context("spawn")) as pool:
        started = {
            name: [
                pool.submit(points_lost, Cell(name, seed, given.effort, given.test, tuple(given.methods)))
                for seed in range(given.seeds)
            ]
            for name in given.models
        }
        for name, futures in started.items():
            found[name] = _show(name, [future.result() for future in futures])
            if given.output:
                given.output.write_text(json.dumps(found, indent=1) + "\n")
    _judge({name: found[name] for name in given.models})


Key = tuple[Bits, ...]
Lost = dict[str, dict[str, float]]
"""By budget and score."""


def points_lost(cell: Cell) -> Lost:
    """Return what the bits of every score lose against float, in points, for every budget."""
    torch.set_num_threads(1)
    samples, _ = make(MODELS[cell.model].task, "calib", SAMPLES, cell.seed)
    subject, members = _subject(cell.model, samples)
    scores = {
        method: score(subject, method, seed=cell.seed) for method in {*cell.methods, *scores_called(DEFAULT_SCORE)}
    }
    return {budget.name: _row(cell, budget, subject, members, scores, samples) for budget in BUDGETS}


def _subject(model: str, samples: Tensor) -> tuple[Subject, list[Member]]:
    graph = folded(model).copy()
    place = Phase("precision", (PlaceQuantizers(placement=placement_of(Bits(MOST, MOST))),))
    Pipeline(phases=(place,), given=frozenset({Fact.FOLDED})).run(graph)
    singles = [(sample[None],) for sample in samples]
    ranges = ranges_by_width(graph, lambda: iter(singles), placement_of=placement_of, widths=WIDTHS)
    subject = Subject(
        graph=graph,
        chunks=chunked(singles[:SCORED], CHUNK),
        placement_of=placement_of,
        weight_widths=WIDTHS,
        activation_widths=WIDTHS,
        ranges=ranges,
    )
    return subject, members_of(graph, singles[0])


def _row(
    cell: Cell,
    budget: Budget,
    subject: Subject,
    members: Sequence[Member],
    scores: Mapping[ScoreMethod, Sensitivity],
    samples: Tensor,
) -> dict[str, float]:
    """Return the points lost by score, the default and uniform bits among them; equal bits are measured once."""
    uniform = {member.name: member.allowed(budget.bits) for member in members}
    limits = {budget.resource: sum(use_of(each, uniform[each.name])[budget.resource] for each in members)}
    networks, lost = dict[Key, tuple[Graph, Quantization]](), dict[Key, float]()

    def decide(bits: Mapping[str, Bits]) -> tuple[Graph, Quantization]:
        key = tuple(bits.values())
        if key not in networks:
            networks[key] = _quantized(cell, subject, bits, samples)
            lost[key] = _lost(cell, *networks[key])
        return networks[key]

    def chosen(methods: Sequence[ScoreMethod]) -> Mapping[str, Bits]:
        found = choose(
            members,
            [scores[each] for each in methods],
            options(WIDTHS, budget.activation_widths),
            limits,
            decide=decide,
            judging=chunked(((sample[None],) for sample in samples[SCORED:]), CHUNK),
            loss=subject.loss,
            progress=Silent(),
        )
        return found[0].bits

    bits = {"uniform": bits_by_map(members, uniform)}
    decide(bits["uniform"])
    bits |= {method.value: dict(chosen([method])) for method in cell.methods}
    bits["default"] = dict(chosen(scores_called(DEFAULT_SCORE)))
    return {name: lost[tuple(each.values())] for name, each in bits.items()}


def _quantized(cell: Cell, subject: Subject, bits: Mapping[str, Bits], samples: Tensor) -> tuple[Graph, Quantization]:
    graph, decided = rounded(subject, bits)
    levers = Levers.of(Effort(cell.effort), Bits(4, 4))
    tried = refinements(levers, seed=cell.seed)
    if not tried:
        return graph, decided
    at_once = refinements_at_once(levers, seed=cell.seed)
    chunks = chunked(((sample[None],) for sample in samples), CHUNK)
    foresight = 1.0 if levers.foresight else 0.0
    return graph, refine_blockwise(graph, chunks, decided, tried, at_once=at_once, foresight=foresight)[0]


@torch.no_grad()
def _lost(cell: Cell, graph: Graph, decided: Quantization) -> float:
    task, simulation = MODELS[cell.model].task, Simulation(decided)
    test = cell.test // 4 if task == "scenes" else cell.test
    images, labels = held_out(task, test)
    found = (graph.run_as([some], simulation)[0].numpy() for some in torch.split(images, BATCH))
    return exact_percent(cell.model, test) - percent(found, labels)


def _show(name: str, runs: Sequence[Lost]) -> dict[str, dict[str, list[float]]]:
    figures = {row: {score: [run[row][score] for run in runs] for score in runs[0][row]} for row in runs[0]}
    columns = list(next(iter(figures.values())))
    rows = [(score, *(spread(figures[row][score], "{:.2f}") for row in figures)) for score in columns]
    render.table(f"{name}: points lost, mean and deviation of {len(runs)} seeds", ("bits by", *figures), rows)
    return figures


def _judge(found: Mapping[str, Mapping[str, Mapping[str, Sequence[float]]]]) -> None:
    """Print the rows in which uniform bits lose more than ``MATTERS``, and where the default is worse than another."""
    rows, shares, behind = list[tuple[str, ...]](), list[float](), list[tuple[float, str]]()
    for model, budgets in found.items():
        for budget, scores in budgets.items():
            lost = {name: mean(values) for name, values in scores.items()}
            singles = {name: value for name, value in lost.items() if name not in ("uniform", "default")}
            best = min(singles, key=lambda name: singles[name])
            behind.append((lost["default"] - singles[best], f"{model}, {budget}, {best}"))
            if lost["uniform"] > MATTERS:
                shares.append(1 - lost["default"] / lost["uniform"])
                figures = (f"{lost['uniform']:.2f}", f"{lost['default']:.2f}", f"{shares[-1]:.0%}", best)
                rows.append((f"{model}, {budget}", *figures, f"{singles[best]:.2f}"))
    render.table(
        f"Where uniform bits lose more than {MATTERS}", ("", "uniform", "default", "less", "best", "its"), rows
    )
    if shares:
        print(f"The default loses {mean(shares):.0%} less on average, {min(shares):.0%} at least.")
    print("The default stands farthest behind the best single score by {:.2f} points: {}.".format(*max(behind)))


if __name__ == "__main__":
    main()
