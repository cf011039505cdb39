"""Builds both engines: the model folded in float, and the same quantized; every step checked."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Final

import torch

from normfuse.bench.timing import EngineSpec
from normfuse.calibration import Ranges, calibrate
from normfuse.checks import Check, check_codes, check_export, check_fold, require
from normfuse.export.onnx import export_onnx
from normfuse.feeding import Stream, fixed_batch
from normfuse.graph import Graph
from normfuse.graph.edit import converted
from normfuse.graph.quantization import requests
from normfuse.passes.insert_quantizers import InsertQuantizers
from normfuse.passes.place_quantizers import PlaceQuantizers
from normfuse.passes.presets import CANONICAL, FOLD, LOWER
from normfuse.passes.quantize_tables import QuantizeTables
from normfuse.pipeline import Fact, Phase, Pipeline
from normfuse.precision import (
    BlockReport,
    Effort,
    chunked,
    foresight,
    refine_blockwise,
    refinements,
    round_all_to_nearest,
)
from normfuse.precision.put_back import Decided
from normfuse.progress import Progress
from normfuse.quant.placement import Placement
from normfuse.recipe import Recipe
from normfuse.report import PassReport

__all__ = [
    "Engine",
    "Plan",
    "build_float",
    "check_quantized",
    "plan_quantization",
    "write_float",
    "write_quantized",
]

CHECKED_BATCHES: Final = 8
"""What every check runs (single samples, where the model fixes no batch): it meets each operator many times."""

CHUNK: Final = 16
"""Samples of one update while a block learns."""

FOLDING: Final = Pipeline(phases=(CANONICAL, FOLD, LOWER))


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """A graph, the ONNX file made of it, what each pass did on the way, and the checks that it went through."""

    graph: Graph
    path: Path
    passes: tuple[PassReport, ...]
    checks: tuple[Check, ...]
    ranges: Ranges | None = None
    quantized_weights: int = 0
    blocks: tuple[BlockReport, ...] = ()
    session_config: dict[str, str] = field(default_factory=dict)

    def spec(self, label: str) -> EngineSpec:
        """Return how to open it, under the name that reports call it."""
        return EngineSpec(label, "onnxruntime", self.path, self.session_config)


def write_float(original: Graph, path: Path) -> tuple[Graph, list[PassReport]]:
    """Fold a copy of the graph and write it as ONNX; return it with what each pass did."""
    graph = original.copy()
    reports = FOLDING.run(graph)
    export_onnx(graph, path)
    return graph, reports


def build_float(original: Graph, samples: Stream, path: Path, *, threads: int, progress: Progress) -> Engine:
    """Fold the model and write it in float32: what ships with 32 bits, and the baseline of everything else.

    Raises:
        CheckFailed: fold or file do not compute what the model does: then there is nothing to fall back to.
    """
    with progress.task("folding and writing the float engine"):
        graph, reports = write_float(original, path)
    seen = list(islice(samples(), CHECKED_BATCHES))
    with progress.task("checking the fold"):
        wide = converted(original, torch.float64)
        FOLDING.run(wide)
        checks = (check_fold(original, wide, seen), check_export(original, path, seen, threads=threads))
    require(checks)
    return Engine(graph=graph, path=path, passes=tuple(reports), checks=checks)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What was decided for a folded graph, before any quantizer is written into it, and how it came to be."""

    decided: Decided
    passes: tuple[PassReport, ...]
    ranges: Ranges
    blocks: tuple[BlockReport, ...]

    @property
    def graph(self) -> Graph:
        """The float graph with requests."""
        return self.decided.graph

    def changed(self, decided: Decided) -> Plan:
        """Return the plan with another decision."""
        return replace(self, decided=decided)

    def simulated(self) -> tuple[Graph, PassReport]:
        """Return a graph with the quantizers: running it is the simulation; and what could not be quantized."""
        graph, chosen = self.graph.copy(), self.decided.quantization
        insert = Phase("precision", (InsertQuantizers(activations=chosen.activations, weights=chosen.weights),))
        (report,) = Pipeline(phases=(insert,), given=frozenset({Fact.PLACED})).run(graph)
        return graph, report


def plan_quantization(
    folded: Graph, samples: Stream, *, recipe: Recipe, placement: Placement, total: int, progress: Progress
) -> Plan:
    """Decide the parameters of every activation and the codes of every weight of a folded float graph.

    Args:
        folded: the float graph; it is not changed.
        samples: calibration samples.
        recipe: bits, effort, calibration method and seed.
        placement: what the target wants quantized.
        total: the number of samples, for the progress bar.
        progress: shows what takes long.
    """
    graph = folded.copy()
    place = Phase("precision", (QuantizeTables(), PlaceQuantizers(placement=placement)))
    reports = Pipeline(phases=(place,), given=frozenset({Fact.FOLDED})).run(graph)
    batch = fixed_batch(graph) or 1
    found = Ranges({}, 0)
    if requests(graph):
        found = calibrate(graph, samples, method=recipe.calibration, total=total // batch, progress=progress)
        found = replace(found, samples=found.samples * batch)  # it counts what it is fed
    ranges = {name: chosen.range for name, chosen in found.chosen.items()}
    with progress.task("quantizing"):
        chosen = round_all_to_nearest(graph, ranges)
    effort, blocks = Effort(recipe.effort), list[BlockReport]()
    if tried := refinements(recipe.precision, effort, seed=recipe.seed, placement=placement):
        chunks = chunked(samples(), CHUNK if graph.has_dynamic_batch else 1)
        ahead = foresight(effort)
        chosen, blocks = refine_blockwise(graph, chunks, chosen, tried, foresight=ahead, progress=progress)
    decided = Decided(graph=graph, ranges=ranges, quantization=chosen)
    return Plan(decided=decided, passes=tuple(reports), ranges=found, blocks=tuple(blocks))


def write_quantized(plan: Plan, path: Path, *, placement: Placement) -> Engine:
    """Write the engine of a plan; it has not been checked yet."""
    graph, report = plan.simulated()
    export_onnx(graph, path)
    return Engine(
        graph=graph,
        path=path,
        passes=(*plan.passes, report),
        checks=(),
        ranges=plan.ranges,
        quantized_weights=len(plan.decided.quantization.weights),
        blocks=plan.blocks,
        session_config=dict(placement.session_config),
    )


def check_quantized(engine: Engine, samples: Stream, *, threads: int) -> Engine:
    """Return the engine with its codes compared, one by one, with the simulation's."""
    seen = list(islice(samples(), CHECKED_BATCHES))
    checks = check_codes(engine.graph, engine.path, seen, threads=threads, session_config=engine.session_config)
    return replace(engine, checks=tuple(checks))
