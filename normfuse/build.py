"""Builds both engines: the model folded in float, and the same quantized; every step checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, Final

import torch

from normfuse.bench.timing import EngineSpec
from normfuse.calibration import Ranges
from normfuse.checks import Check, check_codes, check_export, check_fold, require
from normfuse.export.body import TypedBody
from normfuse.export.onnx import export_onnx
from normfuse.feeding import Stream
from normfuse.graph import Graph
from normfuse.graph.edit import converted
from normfuse.passes.presets import CANONICAL, FOLD, LOWER
from normfuse.pipeline import Pipeline
from normfuse.planning import Plan
from normfuse.precision import BlockReport
from normfuse.progress import Progress
from normfuse.quant.placement import Placement
from normfuse.report import PassReport

__all__ = ["Engine", "build_float", "check_quantized", "write_float", "write_quantized"]

CHECKED_BATCHES: Final = 8
"""What every check runs (single samples, where the model fixes no batch): it meets each operator many times."""

FOLDING: Final = Pipeline(phases=(CANONICAL, FOLD, LOWER))


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """A graph, the ONNX file made of it, what each pass did on the way, and the checks that it went through.

    Where floats have another type than float32 in the file, ``body`` says which nodes have, ``exact`` is the file in
    float32, and ``runs`` the one that shows in onnxruntime what the type rounds (``write_widened``). ``mixed`` says how
    layers got bits of their own, ``front`` which engines it was chosen from, both for the report.
    """

    graph: Graph
    path: Path
    passes: tuple[PassReport, ...]
    checks: tuple[Check, ...]
    ranges: Ranges | None = None
    quantized_weights: int = 0
    kinds: Mapping[str, int] = field(default_factory=dict)
    blocks: tuple[BlockReport, ...] = ()
    session_config: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    body: TypedBody | None = None
    exact: Path | None = None
    runs: Path | None = None
    mixed: Mapping[str, Any] = field(default_factory=dict)
    front: tuple[Mapping[str, Any], ...] = ()

    def spec(self, label: str) -> EngineSpec:
        """Return how to open it, under the name that reports call it."""
        return EngineSpec(label, "onnxruntime", self.runs or self.path, self.session_config, ships=self.path)


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


def write_quantized(plan: Plan, path: Path, *, placement: Placement) -> Engine:
    """Write the engine of a plan; it has not been checked yet."""
    graph, report = plan.simulated(biases_stay_float=placement.biases_stay_float)
    export_onnx(graph, path, standard=placement.standard_operators)
    return Engine(
        graph=graph,
        path=path,
        passes=(*plan.passes, report),
        checks=(),
        ranges=plan.ranges,
        quantized_weights=len(plan.decided.quantization.weights),
        kinds=plan.decided.quantization.kinds,
        blocks=plan.blocks,
        session_config=dict(placement.session_config),
        notes=plan.notes,
        mixed=plan.mixed,
    )


def check_quantized(engine: Engine, samples: Stream, *, threads: int) -> Engine:
    """Return the engine with its codes compared, one by one, with the simulation's."""
    seen = list(islice(samples(), CHECKED_BATCHES))
    checks = check_codes(
        engine.graph, engine.exact or engine.path, seen, threads=threads, session_config=engine.session_config
    )
    return replace(engine, checks=tuple(checks))
