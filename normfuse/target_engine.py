"""The builder's part of a compile: the file that ships is linted, built and audited; what fails is told, not lost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import torch

from normfuse.atomic import write_file
from normfuse.bench.gpu_device import device_at_hand
from normfuse.built import Built
from normfuse.errors import NormfuseError, UnsupportedModel, UsageError
from normfuse.export.lint import TENSORRT_RULES, Finding, Level, lint
from normfuse.export.product_types import product_types
from normfuse.fusion_audit import audit
from normfuse.graph import Graph
from normfuse.graph.program import program_bytes
from normfuse.manifest import ENGINE, FOLDED_MODEL, MODEL
from normfuse.progress import Progress
from normfuse.quant.target import BodyType, Via
from normfuse.recipe import Recipe
from normfuse.running_engines import BuiltFile, differing_outputs, measure_built_files
from normfuse.runtime.engine_layers import read_layers
from normfuse.runtime.engine_session import compute_capability
from normfuse.runtime.engine_sidecar import OF_RTX, read_sidecar, runs_on, sidecar_path
from normfuse.runtime.equivalent_commands import (
    polygraphy_comparison,
    polygraphy_rtx_build,
    trtexec_build,
    trtexec_timing,
)
from normfuse.runtime.shapes import default_shapes, parse_shapes
from normfuse.runtime.tensorrt_backend import backend_of
from normfuse.runtime.tensorrt_build import TENSORRT, BuildOptions, build_engine, installed_backend
from normfuse.strict_json import strict_json

__all__ = ["build_options", "with_target_engine"]

SHOWN: Final = 5
"""Layers that a refusal names."""

LAYERS: Final = "engine_layers.json"

VERSION: Final = "11.4.0.106"
"""The version of TensorRT that commands are written for where none is installed."""

BEFORE_11: Final = "10.13"

TOLERANCE: Final = 1e-2
VALUES: Final = (-2.0, 2.0)
"""With which polygraphy compares the engine with onnxruntime: random inputs within."""


def build_options(recipe: Recipe, original: Graph) -> BuildOptions:
    """Return how the engine of a model is built.

    Raises:
        UsageError: a shape fits no input, an axis other than the batch is free and has no shape, or the timing cache
            cannot be a file.
    """
    cache = Path(recipe.timing_cache) if recipe.timing_cache else None
    if cache is not None and (cache.is_dir() or not cache.absolute().parent.is_dir()):
        raise UsageError(
            "the timing cache cannot be written",
            where=str(cache),
            expected="a file that a build has written, or a new one in a folder that is there",
            hint="make its folder, or choose another --timing-cache",
        )
    given = parse_shapes(recipe.shapes) if recipe.shapes else None
    return BuildOptions(
        shapes=default_shapes(original.input_specs, recipe.batch, given),
        capabilities=(f"SM{recipe.capability.replace('.', '')}",) if recipe.capability else (),
        workspace_bytes=recipe.workspace << 20,
        level=recipe.builder_level,
        seconds=recipe.builder_seconds,
        timing_cache=None if cache is None else cache.absolute(),
        version_compatible=recipe.version_compatible,
    )


def with_target_engine(built: Built, options: BuildOptions, progress: Progress) -> Built:
    """Return a finished compile with the engine of what ships, and what linter, builder and audit say in its report.

    Where there is no builder, or it fails, the error stands beside what was made: nothing is lost.
    """
    model = built.engine.path
    findings = lint(model, TENSORRT_RULES)
    facts: dict[str, Any] = {
        "lint": [finding.as_dict() for finding in findings],
        "products": [product.as_dict() for product in product_types(model)],
        "body": None if built.engine.body is None else built.engine.body.as_dict(),
        "commands": _commands(options, VERSION, is_compared=_is_compared(built)),
        "engine": None,
    }
    files = dict[str, Path]()
    failure: NormfuseError | None = None if built.recipe.build else _refused(findings)
    if built.recipe.build:
        try:
            with progress.task("building the engine"):
                made = _build(built, built.folder.model(ENGINE).with_name(ENGINE), options)
            facts |= {**made.facts, "run": _run(built, made, options, progress)}
            files |= made.files
        except NormfuseError as error:  # an engine that does not run, or computes something else, does not ship either
            failure = error
    if failure is not None:
        facts["failure"] = {
            "what": failure.what,
            "at": failure.where,
            "expected": failure.expected,
            "try": failure.hint,
        }
    return replace(built, report={**built.report, "tensorrt": facts}, files=files, failure=failure)


def _refused(findings: Sequence[Finding]) -> UnsupportedModel | None:
    """Return the error of a file that no builder was asked about, and would be refused by one."""
    errors = [each for each in findings if each.rule.level is Level.ERROR]
    if not errors:
        return None
    return UnsupportedModel(
        f"TensorRT would not build the file: {errors[0].rule.says}",
        where=", ".join(dict.fromkeys(each.layer for each in errors[:SHOWN])),
        expected="a file without errors of the linter",
        hint=errors[0].rule.mend,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """Files of an engine by the names that they get in the artifact, and what is told of it."""

    files: Mapping[str, Path] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)


def _build(built: Built, engine: Path, options: BuildOptions) -> Made:
    backend, model = installed_backend(built.recipe.via), built.engine.path
    program = _program(built, engine) if backend.via is Via.TORCH_TENSORRT else None
    found = build_engine(model, engine, backend, options, program=program)
    layers = read_layers(found.layers)
    listed = engine.with_name(LAYERS)
    write_file(listed, strict_json([asdict(layer) for layer in layers]).encode())
    sidecar = sidecar_path(engine)
    facts = {
        "commands": _commands(
            options,
            found.version if backend.flavour == TENSORRT.flavour else VERSION,
            is_compared=_is_compared(built),
        ),
        "engine": {
            "flavour": backend.flavour,
            "via": backend.via.value,
            "version": found.version,
            "capabilities": list(found.sidecar.capabilities),
            "bytes": engine.stat().st_size,
            "messages": list(found.messages),
            # Of a builder that lists no kernels nothing is known.
            "audit": audit(model, layers).as_dict() if layers else None,
        },
    }
    return Made(files={ENGINE: engine, sidecar.name: sidecar, LAYERS: listed}, facts=facts)


def _run(built: Built, made: Made, options: BuildOptions, progress: Progress) -> dict[str, Any]:
    """Return what running the engine on the GPU at hand showed, or why it was not run.

    Raises:
        NormfuseError: it does not run, or computes something else than onnxruntime.
    """
    device = device_at_hand()
    if device is None or (reason := _reason_not_to_run(built, made, device)):
        return {"reason": "there is no GPU that PyTorch can use" if device is None else reason}
    file = BuiltFile(
        label=built.recipe.label,
        engine=made.files[ENGINE],
        onnx=built.engine.path,
        session=built.session(),
        via=built.recipe.via,
        shapes=options.shapes,
    )
    with progress.task("running the engine"):
        backend = backend_of(made.facts["engine"]["flavour"])
        # Nobody else can write where it was just built; its sidecar is unsigned where no key can be kept.
        found = measure_built_files([file], backend, device=device, trust=True)
    if (differing := differing_outputs(found)) is not None:
        raise differing
    return found


def _reason_not_to_run(built: Built, made: Made, device: str) -> str:
    if not built.recipe.benchmark:
        return "--no-benchmark"
    if built.recipe.version_compatible:
        return "a version-compatible engine wants the lean runtime of the version that built it"
    sidecar, capability = read_sidecar(made.files[ENGINE]), compute_capability(torch.device(device))
    if capability is not None and not runs_on(sidecar, capability):
        return f"it is for {', '.join(sidecar.capabilities) or OF_RTX}, and this GPU is {capability}"
    return ""


def _program(built: Built, engine: Path) -> Path:
    """Write what ships as a program, for a builder that reads no ONNX file."""
    program = engine.with_name(FOLDED_MODEL)
    write_file(program, program_bytes(built.engine.graph))
    return program


def _commands(options: BuildOptions, version: str, *, is_compared: bool) -> dict[str, str]:
    """Return the commands that build, time and compare the same engine, from inside the artifact's folder.

    Builds are told for TensorRT 11 and for those before; ``version`` is what compares.
    """
    model, engine = Path(MODEL), Path(ENGINE)
    usual = {name: shapes[1] for name, shapes in options.shapes.items()}
    compare = {
        "compare": polygraphy_comparison(
            model, options, version=version, atol=TOLERANCE, rtol=TOLERANCE, value_range=VALUES
        )
    }
    return {
        "build": trtexec_build(model, engine, options, version=VERSION),
        "build_before_11": trtexec_build(model, engine, options, version=BEFORE_11),
        "build_rtx": polygraphy_rtx_build(model, engine, options),
        "time": trtexec_timing(engine, usual),
        **(compare if is_compared else {}),
    }


def _is_compared(built: Built) -> bool:
    """Return whether Polygraphy's onnxruntime computes the file as it is, on random floats.

    It takes no session entries, has no bfloat16, and draws no indices.
    """
    engine = built.engine
    is_plain = not engine.session_config and (engine.body is None or engine.body.body is BodyType.FP16)
    return is_plain and all(spec.dtype.is_floating_point for spec in engine.graph.input_specs)
