"""The engine without floats: placed, calibrated, written as integers, and compared bit by bit with its reference."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Final

from normfuse.build import CHECKED_BATCHES, Engine
from normfuse.calibration import ChosenRange, Ranges, calibrate
from normfuse.checks import check_integers, check_no_floats, require
from normfuse.export.onnx import export_onnx
from normfuse.feeding import Stream, fixed_batch
from normfuse.graph import Graph
from normfuse.graph.quantization import requests
from normfuse.heap import give_back_memory
from normfuse.passes.find_affines import FindAffines
from normfuse.passes.lower_to_integers import LowerToIntegers
from normfuse.passes.place_integers import PlaceIntegers
from normfuse.pipeline import Fact, Phase, Pipeline
from normfuse.precision import round_all_to_nearest
from normfuse.progress import Progress
from normfuse.quant import QuantParams, Range
from normfuse.quant.bits import MOST
from normfuse.recipe import Recipe

__all__ = ["build_integers"]

MARGIN: Final = 1.5
"""How much wider than what was seen 16-bit codes reach: it costs them half a bit, and a sum that ends too early far
more."""


def build_integers(  # noqa: PLR0913 - what an engine needs; a bundle of them would be read nowhere else
    folded: Graph, samples: Stream, path: Path, *, recipe: Recipe, total: int, threads: int, progress: Progress
) -> Engine:
    """Write a folded float graph as integers, from its quantized inputs to its outputs.

    Args:
        folded: the float graph; it is not changed.
        samples: calibration samples.
        path: where the ONNX file goes.
        recipe: how ranges are chosen.
        total: the number of samples, for the progress bar.
        threads: onnxruntime's, for the comparison.
        progress: shows what takes long.

    Raises:
        UnsupportedModel: an operator has no integer form, or a sum could overflow; the message names the layer.
        CheckFailed: the file does not compute what the reference does, or holds a float tensor.
    """
    graph = folded.copy()
    place = Phase("integers", (FindAffines(), PlaceIntegers()))
    placed = Pipeline(phases=(place,), given=frozenset({Fact.CANONICAL, Fact.FOLDED})).run(graph)
    ranges = _ranges(graph, samples, recipe, total, progress)
    with progress.task("writing integers"):
        chosen = round_all_to_nearest(graph, ranges.by_name)
        activations = {name: each for name, each in chosen.activations.items() if isinstance(each, QuantParams)}
        lower = Phase("integers", (LowerToIntegers(activations=activations, weights=chosen.weights),))
        lowered = Pipeline(phases=(lower,), given=frozenset({Fact.PLACED})).run(graph)
        export_onnx(graph, path)
    give_back_memory()
    with progress.task("comparing engine and reference"):
        seen = list(islice(samples(), CHECKED_BATCHES))
        checks = (check_integers(graph, path, seen, threads=threads), check_no_floats(path))
    require(checks)
    return Engine(
        graph=graph,
        path=path,
        passes=(*placed, *lowered),
        checks=checks,
        ranges=ranges,
        quantized_weights=len(chosen.weights),
    )


def _ranges(graph: Graph, samples: Stream, recipe: Recipe, total: int, progress: Progress) -> Ranges:
    batch = fixed_batch(graph) or 1
    found = calibrate(graph, samples, method=recipe.calibration, total=total // batch, progress=progress)
    wide = {request.source.name for request in requests(graph) if request.type.bits > MOST}
    return replace(found, chosen=_widened(found.chosen, wide), samples=found.samples * batch)


def _widened(chosen: Mapping[str, ChosenRange], wide: set[str]) -> dict[str, ChosenRange]:
    """Return the ranges with those of 16-bit codes beyond what was seen."""
    return {
        name: replace(
            found,
            range=Range(MARGIN * found.observed.minimum, MARGIN * found.observed.maximum),
            method="min-max, widened",
        )
        if name in wide
        else found
        for name, found in chosen.items()
    }
