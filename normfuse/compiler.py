"""The facade: model and samples in, a measured artifact out; the way of the data as one readable list."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from normfuse.artifact import ArtifactWriter, read_artifact
from normfuse.bench.comparison import Comparison
from normfuse.bench.environment import default_threads, describe_environment
from normfuse.bench.timing import EngineSpec
from normfuse.bench.verdict import Judgement, Verdict, judge
from normfuse.build import Engine, bind, build_float, build_quantized, stream
from normfuse.data import Samples, load_samples
from normfuse.errors import UsageError
from normfuse.export.placement import onnx_placement
from normfuse.graph import Graph, capture
from normfuse.graph.capture import export_program
from normfuse.loading import LoadedModel, load_model
from normfuse.measure import Measured, compare_engines
from normfuse.page import render_page
from normfuse.progress import Progress, Silent
from normfuse.recipe import Recipe
from normfuse.runtime.instruction_set import detect_instruction_set
from normfuse.runtime.onnx_session import OnnxSession, open_onnx

__all__ = ["Built", "capture_model", "compile", "load", "save"]

Model = nn.Module | ExportedProgram | LoadedModel | str | Path
Data = Samples | str | Path | None

FLOAT_BITS: Final = 32
FLOAT, QUANTIZED = "float", "int8"


class Workspace:
    """A temporary folder that lives as long as somebody holds it."""

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="normfuse-"))
        self._end = weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Built:
    """A finished compile that has no place yet: ``report`` is plain data, ``save`` writes the artifact."""

    recipe: Recipe
    report: dict[str, Any]
    engine: Engine
    holds: bool
    folder: Workspace = field(repr=False)

    def save(self, target: str | Path) -> None:
        """Write the artifact, whole or not at all.

        Raises:
            UsageError: the folder exists and is no artifact.
            BadInput: it cannot be written.
        """
        report, recipe = self.report, self.recipe.to_toml()
        with ArtifactWriter(Path(target)) as writer:
            writer.add_file(self.engine.path, "model.onnx")
            writer.add_text("recipe.toml", recipe)
            writer.add_json("ranges.json", self.engine.ranges.as_dict() if self.engine.ranges else {})
            writer.add_json("report.json", report)
            writer.add_text("report.html", render_page(report))
            writer.finish(
                {
                    "model": report["model"],
                    "recipe_sha256": hashlib.sha256(recipe.encode()).hexdigest(),
                    "seed": self.recipe.seed,
                    "session_config": self.engine.session_config,
                    "verdict": report["verdict"],
                    "environment": report["environment"],
                }
            )

    def session(self, *, threads: int = 0) -> OnnxSession:
        """Open the engine that ``save`` would write."""
        return open_onnx(self.engine.path, threads=default_threads(threads), session_config=self.engine.session_config)


def compile(
    model: Model,
    example_inputs: Sequence[Tensor] | None = None,
    *,
    calibration: Data = None,
    evaluation: Data = None,
    recipe: Recipe | None = None,
    progress: Progress | None = None,
) -> Built:
    """Fold, quantize, verify and measure a model.

    Args:
        model: a module, an exported program, or the path of a model file.
        example_inputs: tensors to capture a module with; else the first calibration sample serves.
        calibration: samples for the ranges; needed for 8 bits.
        evaluation: labelled samples for the accuracy; else the outputs are compared on the calibration samples.
        recipe: what to build and how.
        progress: shows what takes long.

    Raises:
        NormfuseError: see ``normfuse.errors``; nothing is left behind.
    """
    recipe, shown = recipe or Recipe(), progress or Silent()
    threads = default_threads(recipe.threads)
    torch.manual_seed(recipe.seed)
    samples = _samples(calibration)
    if samples is None and recipe.bits != FLOAT_BITS:
        raise UsageError(
            "8 bits need calibration data", expected="samples like those the model will see", hint="--calib DATA"
        )
    with shown.task("capturing the model"):
        original = capture_model(model, example_inputs, samples)
    bound = bind(samples, original) if samples is not None else None
    folder = Workspace()
    source = stream(bound, original, limit=recipe.samples) if bound else _random_stream(original)
    floating = build_float(original, source, folder.path / "float.onnx", threads=threads, progress=shown)
    engines = {FLOAT: floating}
    if recipe.bits != FLOAT_BITS and bound is not None:
        engines[QUANTIZED] = build_quantized(
            floating.graph,
            source,
            folder.path / "int8.onnx",
            recipe=recipe,
            placement=onnx_placement(detect_instruction_set().value),
            total=min(len(bound), recipe.samples or len(bound)),
            threads=threads,
            progress=shown,
        )
    judged = bind(held, original) if (held := _samples(evaluation)) is not None else bound
    what = Measured(
        engines=[
            EngineSpec(label, "onnxruntime", engine.path, engine.session_config) for label, engine in engines.items()
        ],
        evaluation=judged if evaluation is not None else _without_labels(judged),
        fixed_batch=original.input_specs[0].shape[0],
    )
    comparison = compare_engines(what, batch=recipe.batch, threads=threads, speed=recipe.benchmark, progress=shown)
    return _conclude(model, original, engines, comparison, recipe, folder)


def _conclude(
    model: Model,
    original: Graph,
    engines: dict[str, Engine],
    comparison: Comparison,
    recipe: Recipe,
    folder: Workspace,
) -> Built:
    """Judge, choose the engine that ships, and write the report."""
    judgement = Judgement(Verdict.KEPT, ("folded float model, as asked",))
    if QUANTIZED in engines:
        judgement = judge(comparison, QUANTIZED, max_drop=recipe.max_drop, min_speedup=recipe.min_speedup)
        ranges = engines[QUANTIZED].ranges
        if ranges is not None and not ranges.chosen:
            judgement = Judgement(Verdict.FELL_BACK, ("nothing in the model can be quantized",))
    checks = [check for engine in engines.values() for check in engine.checks]
    failed = [check for check in checks if not check.holds]
    if any(check in failed for check in engines.get(QUANTIZED, engines[FLOAT]).checks):
        judgement = Judgement(Verdict.FELL_BACK, ("a check failed: " + failed[0].name, *judgement.reasons))
    kept = judgement.verdict is not Verdict.FELL_BACK
    shipped = engines.get(QUANTIZED, engines[FLOAT]) if kept else engines[FLOAT]
    report = {
        "model": _describe(model, original),
        "recipe": recipe.to_toml(),
        "passes": [report.as_dict() for engine in engines.values() for report in engine.passes],
        "quantization": _quantization(engines.get(QUANTIZED)),
        "checks": [check.as_dict() for check in checks],
        "comparison": comparison.as_dict(),
        "verdict": {**judgement.as_dict(), "ships": QUANTIZED if shipped is not engines[FLOAT] else FLOAT},
        "environment": describe_environment().as_dict(),
    }
    return Built(recipe=recipe, report=report, engine=shipped, holds=kept and not failed, folder=folder)


def _describe(model: Model, original: Graph) -> dict[str, Any]:
    known = {"kind": model.kind.value, "sha256": model.sha256} if isinstance(model, LoadedModel) else {}
    return {
        **known,
        "inputs": [_port(spec) for spec in original.input_specs],
        "outputs": [_port(spec) for spec in original.output_specs],
        "constant_bytes": original.constant_bytes(),
        "notes": list(original.notes),
    }


def _port(spec: Any) -> dict[str, Any]:
    return {"name": spec.name, "shape": list(spec.shape), "dtype": str(spec.dtype).removeprefix("torch.")}


def _quantization(engine: Engine | None) -> dict[str, Any]:
    if engine is None or engine.ranges is None:
        return {}
    codes = [tensor for path, tensor in engine.graph.module.named_buffers() if path.endswith("_codes")]
    histogram: dict[str, int] = {}
    for tensor in codes:
        label = str(tensor.dtype).removeprefix("torch.")
        histogram[label] = histogram.get(label, 0) + tensor.numel()
    total = sum(tensor.numel() for tensor in engine.graph.module.buffers())
    histogram["float32"] = total - sum(histogram.values())
    bits = 8.0 * engine.graph.constant_bytes() / max(total, 1)
    return {"constants_by_type": histogram, "effective_bits": round(bits, 3), **engine.ranges.as_dict()}


def capture_model(
    model: Model, example_inputs: Sequence[Tensor] | None = None, samples: Samples | None = None
) -> Graph:
    """Return the graph of any kind of model; a module is captured with the first sample where nothing else is given.

    Raises:
        NormfuseError: the file is no model, or the model cannot be captured.
    """
    if isinstance(model, (str, Path)):
        model = load_model(model)
    inner = model.model if isinstance(model, LoadedModel) else model
    if example_inputs is None and samples is not None and not isinstance(inner, ExportedProgram):
        first = next(samples.batches(1))
        example_inputs = [torch.from_numpy(array) for array in first.inputs.values()]
    return capture(inner, example_inputs)


def _samples(data: Data) -> Samples | None:
    return data if isinstance(data, Samples) or data is None else load_samples(data)


def _without_labels(samples: Samples | None) -> Samples | None:
    # Calibration samples have been seen: their labels say nothing about accuracy.
    return None if samples is None else replace(samples, labels=None)


def _random_stream(graph: Graph) -> Any:
    """Return a source of a few random samples, for checks of a model that came without data."""

    def read() -> Any:
        generator = torch.Generator().manual_seed(0)
        for _ in range(4):
            yield [_random(spec, generator) for spec in graph.input_specs]

    return read


def _random(spec: Any, generator: torch.Generator) -> Tensor:
    sizes = [size or 1 for size in spec.shape]
    if spec.dtype.is_floating_point:
        return torch.randn(sizes, generator=generator).to(spec.dtype)
    return torch.randint(0, 2, sizes, generator=generator).to(spec.dtype)


def save(model: nn.Module, example_inputs: Sequence[Tensor], path: str | Path) -> None:
    """Write a module as a torch.export archive in eval mode: the safe form that ``normfuse compile`` reads.

    The batch axis (the first of every input) stays dynamic where the model allows it.

    Raises:
        UnsupportedModel: torch.export cannot capture it.
    """
    program = export_program(model, example_inputs)
    torch.export.save(program, str(path))


def load(folder: str | Path, *, threads: int = 0) -> OnnxSession:
    """Open an artifact as a callable session: ``session(image=array)["output"]``.

    Raises:
        BadInput: the folder is no artifact, or its model cannot be opened.
    """
    artifact = read_artifact(folder)
    return open_onnx(artifact.model, threads=default_threads(threads), session_config=artifact.session_config)
