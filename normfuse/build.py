"""Builds both engines: the model folded in float, and the same quantized; every step checked."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from normfuse.calibration import Ranges, calibrate
from normfuse.checks import Check, check_codes, check_export, check_fold
from normfuse.data import InputSpec, Samples, check_samples
from normfuse.export.onnx import export_onnx
from normfuse.graph import Graph
from normfuse.graph.edit import converted
from normfuse.passes.insert_quantizers import InsertQuantizers
from normfuse.passes.place_quantizers import PlaceQuantizers
from normfuse.passes.presets import CANONICAL, FOLD, LOWER
from normfuse.pipeline import Fact, Phase, Pipeline
from normfuse.progress import Progress
from normfuse.quant.placement import Placement
from normfuse.recipe import Recipe
from normfuse.report import PassReport

__all__ = ["Engine", "bind", "build_float", "build_quantized", "stream", "write_float"]

CHECKED_SAMPLES: Final = 8
"""Samples that every check runs: enough to meet each operator many times, quick at any size."""

FOLDING: Final = Pipeline(phases=(CANONICAL, FOLD, LOWER))

Stream = Callable[[], Iterator[Sequence[Tensor]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """A graph, the ONNX file made of it, what each pass did on the way, and the checks that it went through."""

    graph: Graph
    path: Path
    passes: tuple[PassReport, ...]
    checks: tuple[Check, ...]
    ranges: Ranges | None = None
    session_config: dict[str, str] = field(default_factory=dict)


def bind(samples: Samples, graph: Graph) -> Samples:
    """Return the samples under the names and in the types of the graph's inputs.

    Raises:
        BadInput: they do not fit; the message names file, array, expected and found.
    """
    specs = [
        InputSpec(spec.name, (None, *spec.shape[1:]), str(spec.dtype).removeprefix("torch."))
        for spec in graph.input_specs
    ]
    return check_samples(samples, specs)


def stream(samples: Samples, graph: Graph, *, limit: int = 0) -> Stream:
    """Return a source of single samples as tensors (whole batches where the model fixes its batch)."""
    fixed = graph.input_specs[0].shape[0]
    kept = samples.first(limit) if limit else samples

    def read() -> Iterator[Sequence[Tensor]]:
        for batch in kept.batches(fixed or 1):
            if fixed is None or len(batch) == fixed:
                yield [torch.from_numpy(batch.inputs[name]) for name in graph.input_names]

    return read


def write_float(original: Graph, path: Path) -> tuple[Graph, list[PassReport]]:
    """Fold a copy of the graph and write it as ONNX; return it with what each pass did."""
    graph = original.copy()
    reports = FOLDING.run(graph)
    export_onnx(graph, path)
    return graph, reports


def build_float(original: Graph, samples: Stream, path: Path, *, threads: int, progress: Progress) -> Engine:
    """Fold the model and write it in float32: what ships with 32 bits, and the baseline of everything else."""
    with progress.task("folding and writing the float engine"):
        graph, reports = write_float(original, path)
    seen = list(islice(samples(), CHECKED_SAMPLES))
    with progress.task("checking the fold"):
        wide = converted(original, torch.float64)
        FOLDING.run(wide)
        checks = (check_fold(original, wide, seen), check_export(original, path, seen, threads=threads))
    return Engine(graph=graph, path=path, passes=tuple(reports), checks=checks)


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
    graph = folded.copy()
    place = Phase("precision", (PlaceQuantizers(placement=placement),))
    reports = Pipeline(phases=(place,), given=frozenset({Fact.FOLDED})).run(graph)
    ranges = calibrate(graph, samples, method=recipe.calibration, total=total, progress=progress)
    chosen = {name: found.range for name, found in ranges.chosen.items()}
    insert = Phase("precision", (InsertQuantizers(ranges=chosen, weight=placement.weight),))
    with progress.task("quantizing"):
        reports += Pipeline(phases=(insert,), given=frozenset({Fact.PLACED})).run(graph)
    with progress.task("writing the quantized engine"):
        export_onnx(graph, path)
    config = dict(placement.session_config)
    with progress.task("comparing engine and simulation"):
        seen = islice(samples(), CHECKED_SAMPLES)
        checks = check_codes(graph, path, seen, threads=threads, session_config=config)
    return Engine(
        graph=graph, path=path, passes=tuple(reports), checks=tuple(checks), ranges=ranges, session_config=config
    )
