"""Rotates residual streams and attention heads where the quantized network errs less for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Final

import torch
from torch import Tensor

from normfuse.calibration import calibrate
from normfuse.graph import Graph
from normfuse.passes.find_affines import FindAffines
from normfuse.passes.presets import LOWER, rotations
from normfuse.passes.recentre_stream import RecentreStream
from normfuse.pipeline import Fact, Phase, Pipeline
from normfuse.precision import round_all_to_nearest, samples_in, split
from normfuse.precision.put_back import Decided, output_error
from normfuse.progress import Progress
from normfuse.quant.calibration_method import CalibrationMethod
from normfuse.report import PassReport, Reason, Refusal

__all__ = ["rotated_if_better"]

HELD_OUT: Final = 4
"""One of so many samples judges; the others give ranges."""


def rotated_if_better(
    graph: Graph, place: Phase, chunks: Sequence[Sequence[Tensor]], *, seed: int, progress: Progress
) -> tuple[Graph, list[PassReport]]:
    """Return a rotated copy if its outputs err less than the graph's, else the graph; and what was done (ours).

    Both are quantized to the nearest codes, with ranges of least squared error from the chunks that do not judge; the
    error is that of the network's outputs on those that do. A rotation is of a whole stream, so no block can be asked.
    Layer norms of a stream that can be centred become RMS norms first: those turn with their stream.

    Args:
        graph: a folded float graph; it is not changed.
        place: the passes that say what is quantized.
        chunks: batches of samples, one tensor per input.
        seed: of the rotations.
        progress: shows the two trials.
    """
    rotated, rotate = graph.copy(), rotations(seed)
    phase = Phase("rotations", (FindAffines(), RecentreStream(), *rotate.passes, *LOWER.passes))
    reports = Pipeline(phases=(phase,), given=frozenset({Fact.CANONICAL, Fact.FOLDED})).run(rotated)
    turns = [report for report in reports if report.name in {step.name for step in rotate.passes}]
    if not any(report.applied for report in turns):
        return graph, turns
    places = split([samples_in(chunk) for chunk in chunks], HELD_OUT)
    teaching, judging = ([chunks[at] for at in each] for each in (places.teaching, places.judging))
    with torch.no_grad():
        targets = [graph.run(*chunk) for chunk in judging]
    errors = list[float]()
    with progress.task("judging rotations", 2) as advance:
        for each in (graph, rotated):
            errors.append(output_error(_nearest(each, place, teaching), judging, targets))
            advance(1)
    before, after = errors
    told = f"error of the outputs {before:.3g} without, {after:.3g} with"
    if after < before:
        turned = tuple(
            {"rule": "turned", "node": site["into"], "turned": told} for each in turns for site in each.sites
        )
        kept = PassReport(name="judge-rotations", applied={"kept": len(turned)}, sites=turned)
        return rotated, [*(replace(report, sites=()) for report in reports), kept]
    reverted = Refusal(graph.outputs[0].name, Reason.NO_GAIN, told)
    return graph, [PassReport(name="judge-rotations", applied={}, refused=(reverted,))]


def _nearest(graph: Graph, place: Phase, chunks: Sequence[Sequence[Tensor]]) -> Decided:
    """Return the graph quantized in the plainest way."""
    placed = graph.copy()
    Pipeline(phases=(place,), given=frozenset({Fact.FOLDED})).run(placed)
    found = calibrate(placed, lambda: chunks, method=CalibrationMethod.MSE)
    ranges = found.by_name
    return Decided(graph=placed, ranges=ranges, quantization=round_all_to_nearest(placed, ranges))
