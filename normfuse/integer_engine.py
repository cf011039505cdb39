"""The engine without floats: placed, calibrated, written as integers, and compared bit by bit with its reference."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

from normfuse.build import CHECKED_BATCHES, Engine
from normfuse.checks import check_integers, check_islands, check_no_floats, require
from normfuse.export.onnx import export_onnx
from normfuse.feeding import Stream
from normfuse.graph import Graph
from normfuse.heap import give_back_memory
from normfuse.integer_plan import plan_integers
from normfuse.passes.lower_to_integers import LowerToIntegers
from normfuse.pipeline import Fact, Phase, Pipeline
from normfuse.progress import Progress
from normfuse.recipe import Recipe

__all__ = ["build_integers"]


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
        UnsupportedModel: an operator has no integer form, or a sum could overflow, and it may not stay float; the
            message names the layer.
        CheckFailed: the file does not compute what the reference does, or holds a float tensor that may not be there.
    """
    plan = plan_integers(folded, samples, recipe=recipe, total=total, progress=progress)
    graph = plan.graph.copy()
    with progress.task("writing integers"):
        lower = LowerToIntegers(activations=plan.activations, weights=plan.weights, allows_islands=plan.allows_islands)
        lowered = Pipeline(phases=(Phase("integers", (lower,)),), given=frozenset({Fact.PLACED})).run(graph)
        export_onnx(graph, path)
    give_back_memory()
    with progress.task("comparing engine and reference"):
        seen = list(islice(samples(), CHECKED_BATCHES))
        if any(report.refused for report in lowered):
            checks = check_islands(graph, path, seen, threads=threads)
        else:
            checks = (check_integers(graph, path, seen, threads=threads), check_no_floats(path))
    require(checks)
    return Engine(
        graph=graph,
        path=path,
        passes=(*plan.passes, *lowered),
        checks=checks,
        ranges=plan.ranges,
        quantized_weights=len(plan.weights),
        blocks=plan.blocks,
    )
