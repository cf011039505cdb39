"""Builds both engines: the model folded in float, and the same quantized; every step checked."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Final

import torch

from normfuse.calibration import Ranges, calibrate
from normfuse.checks import Check, check_codes, check_export, check_fold, require
from normfuse.export.onnx import export_onnx
from normfuse.feeding import Stream, fixed_batch
from normfuse.graph import Graph
from normfuse.graph.edit import converted
from normfuse.graph.quantization import requests
from normfuse.passes.equalize_channels import EqualizeChannels
from normfuse.passes.insert_quantizers import InsertQuantizers
from normfuse.passes.place_quantizers import PlaceQuantizers
from normfuse.passes.presets import CANONICAL, FOLD, LOWER
from normfuse.pipeline import Fact, Phase, Pipeline
from normfuse.precision import (
    BlockReport,
    Effort,
    choose_equalizations,
    chunked,
    refine_blockwise,
    refinements,
    round_all_to_nearest,
)
from normfuse.progress import Progress
from normfuse.quant.placement import Placement
from normfuse.recipe import Recipe
from normfuse.report import PassReport

__all__ = ["Engine", "Quantized", "build_float", "build_quantized", "quantize_graph", "write_float"]

CHECKED_BATCHES: Final = 8
"""What every check runs (single samples, where the model fixes no batch): it meets each operator many times."""

EQUALIZED_SAMPLES: Final = 64
"""How many samples choose scales and shifts of channels, the last quarter of them held out."""

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
class Quantized:
    """A graph with quantizers, and how it came to be."""

    graph: Graph
    passes: tuple[PassReport, ...]
    ranges: Ranges
    weights: int
    blocks: tuple[BlockReport, ...]


def quantize_graph(
    folded: Graph, samples: Stream, *, recipe: Recipe, placement: Placement, total: int, progress: Progress
) -> Quantized:
    """Quantize a copy of a folded float graph: running it is the simulation.

    Args:
        folded: the float graph; it is not changed.
        samples: calibration samples.
        recipe: bits, effort, calibration method and seed.
        placement: what the target wants quantized.
        total: the number of samples, for the progress bar.
        progress: shows what takes long.
    """
    graph = folded.copy()
    place = Phase("precision", (PlaceQuantizers(placement=placement),))
    reports = _equalize(graph, samples, place, progress) if recipe.equalize else []
    reports += Pipeline(phases=(place,), given=frozenset({Fact.FOLDED})).run(graph)
    batch = fixed_batch(graph) or 1
    ranges = Ranges({}, 0)
    if requests(graph):
        ranges = calibrate(graph, samples, method=recipe.calibration, total=total // batch, progress=progress)
        ranges = replace(ranges, samples=ranges.samples * batch)  # it counts what it is fed
    with progress.task("quantizing"):
        decided = round_all_to_nearest(graph, {name: found.range for name, found in ranges.chosen.items()})
    blocks = list[BlockReport]()
    if tried := refinements(recipe.precision, Effort(recipe.effort), seed=recipe.seed):
        chunks = chunked(samples(), CHUNK if graph.has_dynamic_batch else 1)
        decided, blocks = refine_blockwise(graph, chunks, decided, tried, progress=progress)
    insert = Phase("precision", (InsertQuantizers(activations=decided.activations, weights=decided.weights),))
    reports += Pipeline(phases=(insert,), given=frozenset({Fact.PLACED})).run(graph)
    return Quantized(
        graph=graph, passes=tuple(reports), ranges=ranges, weights=len(decided.weights), blocks=tuple(blocks)
    )


def _equalize(graph: Graph, samples: Stream, place: Phase, progress: Progress) -> list[PassReport]:
    """Make the channels of what will be quantized alike where that helps; some samples are enough to tell."""
    placed = graph.copy()
    Pipeline(phases=(place,), given=frozenset({Fact.FOLDED})).run(placed)
    size = CHUNK if graph.has_dynamic_batch else 1
    chunks = chunked(islice(samples(), EQUALIZED_SAMPLES // (fixed_batch(graph) or 1)), size)
    chosen = choose_equalizations(graph, placed, chunks, progress=progress)
    phase = Phase("equalization", (EqualizeChannels(chosen=chosen), *LOWER.passes))
    return Pipeline(phases=(phase,), given=frozenset({Fact.FOLDED})).run(graph)


def build_quantized(  # noqa: PLR0913 - what a build needs; a bundle of them would be read nowhere else
    folded: Graph,
    samples: Stream,
    path: Path,
    *,
    recipe: Recipe,
    placement: Placement,
    total: int,
    threads: int,
    progress: Progress,
) -> Engine:
    """Quantize a folded float graph, write it, and compare engine and simulation code by code."""
    found = quantize_graph(folded, samples, recipe=recipe, placement=placement, total=total, progress=progress)
    with progress.task("writing the quantized engine"):
        export_onnx(found.graph, path)
    config = dict(placement.session_config)
    with progress.task("comparing engine and simulation"):
        seen = list(islice(samples(), CHECKED_BATCHES))
        checks = check_codes(found.graph, path, seen, threads=threads, session_config=config)
    return Engine(
        graph=found.graph,
        path=path,
        passes=found.passes,
        checks=tuple(checks),
        ranges=found.ranges,
        quantized_weights=found.weights,
        blocks=found.blocks,
        session_config=config,
    )
