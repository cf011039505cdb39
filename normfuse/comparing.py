"""Measures artifacts that exist, against each other and against the model they come from."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Sequence
from itertools import chain, count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from normfuse.artifact import read_intact
from normfuse.bench.accuracy import check_labels
from normfuse.bench.environment import default_threads, describe_environment
from normfuse.bench.gpu_device import device_at_hand
from normfuse.bench.inputs import Wanted, make_inputs
from normfuse.bench.timing import EngineSpec
from normfuse.build import write_float
from normfuse.built import load
from normfuse.compiler import capture_model
from normfuse.data import InputSpec, Samples, check_samples, survey_evaluation
from normfuse.errors import BadInput, MissingDependency
from normfuse.graph.program import to_program
from normfuse.loading import LoadedModel
from normfuse.manifest import ENGINE
from normfuse.measure import Measured, compare_engines
from normfuse.progress import Progress
from normfuse.quant.target import Via
from normfuse.running_engines import BuiltFile, measure_built_files
from normfuse.runtime.engine_sidecar import check_engine, read_sidecar, sidecar_path
from normfuse.runtime.onnx_session import Port, open_onnx
from normfuse.runtime.tensorrt_backend import Backend, backend_of, installed_backend

__all__ = ["compare_artifacts", "compare_built_engines"]


def compare_artifacts(
    folders: Sequence[Path],
    *,
    against: LoadedModel | None,
    evaluation: Samples | None,
    batch: int,
    threads: int,
    progress: Progress,
) -> dict[str, Any]:
    """Return a comparison as plain data; with ``against``, eager PyTorch and float onnxruntime are in it.

    Raises:
        BadInput: a folder is no artifact or a damaged one, or the samples do not fit the first one.
        UnsupportedModel: the model cannot be captured with inputs like the first artifact's.
        CheckFailed: an engine crashed.
    """
    threads = default_threads(threads)
    artifacts = [read_intact(folder) for folder in folders]
    session = open_onnx(artifacts[0].model, threads=threads)
    ports = session.inputs
    bound = check_samples(evaluation, _specifications(ports)) if evaluation is not None else None
    warnings = _survey(bound, session.outputs[0], progress) if bound is not None else []
    with tempfile.TemporaryDirectory(prefix="normfuse-") as folder:
        engines = _baselines(against, _examples(ports, bound), Path(folder), progress) if against is not None else []
        labels = _labels(folders, taken=[engine.label for engine in engines])
        engines += [
            EngineSpec(label, "onnxruntime", found.model, found.session_config)
            for label, found in zip(labels, artifacts, strict=True)
        ]
        what = Measured(engines=engines, evaluation=bound, fixed_batch=_fixed_batch(ports))
        comparison = compare_engines(what, batch=batch, threads=threads, speed=True, progress=progress)
    return {
        "warnings": warnings,
        "comparison": comparison.as_dict(),
        "environment": describe_environment().as_dict(),
    }


def compare_built_engines(
    folders: Sequence[Path], *, batch: int | None, trust: bool, progress: Progress
) -> dict[str, Any]:
    """Return how TensorRT engines of artifacts run on the GPU at hand, as plain data (``measure_built_files``).

    Args:
        folders: artifacts with engines.
        batch: the first size of inputs with free axes; None: that of the usual shape.
        trust: engines without a sidecar are taken.
        progress: told what is done.

    Raises:
        MissingDependency: there is no GPU that PyTorch can use, or the library is not installed.
        BadInput: a folder is no artifact, has no engine, or its engine is refused (``check_engine``).
        CheckFailed: an engine does not run.
    """
    labels = _labels(folders, taken=[])
    files = [_built_file(folder, label, trust=trust) for folder, label in zip(folders, labels, strict=True)]
    device = device_at_hand()
    if device is None:
        raise MissingDependency(
            "a GPU that PyTorch can use",
            needed_for="running engines",
            install="run it on a machine with an NVIDIA GPU, with a PyTorch that is built for CUDA",
        )
    with progress.task("running the engines"):
        return measure_built_files(files, _backend(files[0].engine), device=device, batch=batch, trust=trust)


def _built_file(folder: Path, label: str, *, trust: bool) -> BuiltFile:
    """Return an artifact's engine, checked as far as that goes without a library and a GPU."""
    artifact = read_intact(folder)
    engine = folder / ENGINE
    if not engine.is_file():
        raise BadInput(
            "the artifact has no engine",
            where=str(folder),
            expected=f"{ENGINE}, as normfuse compile --target trt writes it where TensorRT is installed",
            hint="the ONNX file is measured without --engine",
        )
    written = None if trust and not sidecar_path(engine).exists() else read_sidecar(engine)
    sidecar = written and check_engine(
        engine, backend_module=written.flavour, backend_version=written.version, onnx=artifact.model, trust=trust
    )
    return BuiltFile(
        label=label,
        engine=engine,
        onnx=artifact.model,
        session=load(folder),
        via=Via.ONNX if sidecar is None else sidecar.via,
        shapes={} if sidecar is None else sidecar.shapes,
    )


def _backend(engine: Path) -> Backend:
    return backend_of(read_sidecar(engine).flavour) if sidecar_path(engine).exists() else installed_backend()


def _survey(samples: Samples, output: Port, progress: Progress) -> list[str]:
    """Read all samples once, before engines are built and timed; return warnings."""
    if samples.labels is not None:
        check_labels(samples.labels, output.shape, where=samples.source)
    with progress.task("reading the samples", len(samples)) as advance:
        return survey_evaluation(samples, advance)


def _labels(folders: Sequence[Path], *, taken: Sequence[str]) -> list[str]:
    """Return one label per folder: its name, where names are equal its path, where paths are too a number after it."""
    names = Counter([*taken, *(folder.resolve().name for folder in folders)])
    used = set(taken)
    labels = []
    for folder in folders:
        name = folder.resolve().name if names[folder.resolve().name] == 1 else str(folder)
        numbered = (f"{name} ({number})" for number in count(2))
        labels.append(next(label for label in chain([name], numbered) if label not in used))
        used.add(labels[-1])
    return labels


def _baselines(model: LoadedModel, examples: Sequence[Tensor], folder: Path, progress: Progress) -> list[EngineSpec]:
    with progress.task("building the float baseline"):
        graph = capture_model(model, examples)
        torch.export.save(to_program(graph), folder / "eager.pt2")
        write_float(graph, folder / "float.onnx")
    return [
        EngineSpec("float", "onnxruntime", folder / "float.onnx"),
        EngineSpec("PyTorch eager", "torch", folder / "eager.pt2"),
    ]


def _examples(ports: Sequence[Port], samples: Samples | None) -> list[Tensor]:
    """Return what to capture a module with: samples where there are enough for a batch, else random arrays."""
    size = _fixed_batch(ports) or 1
    if samples is not None and len(samples) >= size:
        arrays = next(samples.batches(size)).inputs
    else:
        wanted = [Wanted(port.name, port.shape, port.dtype) for port in ports]
        arrays = make_inputs(wanted, batch=size, seed=0)
    # An input without axes has no batch either: one number serves all samples.
    tensors = [(port, torch.from_numpy(arrays[port.name])) for port in ports]
    return [tensor if port.shape else tensor.reshape(-1)[0] for port, tensor in tensors]


def _fixed_batch(ports: Sequence[Port]) -> int | None:
    return next((port.shape[0] for port in ports if port.shape and port.shape[0] is not None), None)


def _specifications(ports: Sequence[Port]) -> list[InputSpec]:
    return [InputSpec(port.name, (None, *port.shape[1:]), port.dtype.name) for port in ports]
