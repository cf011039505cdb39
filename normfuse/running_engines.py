"""TensorRT engines on the GPU at hand: how fast they are, and whether they compute what onnxruntime does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from normfuse.bench.engine_runs import EngineJob, EngineRun, run_engines
from normfuse.bench.gpu_timing import GpuSchedule
from normfuse.bench.inputs import Wanted, make_inputs
from normfuse.checks import rounding_allowed
from normfuse.errors import BadInput, CheckFailed
from normfuse.export.widened import is_bfloat16
from normfuse.quant.target import BodyType, Via
from normfuse.runtime.agreement import output_error
from normfuse.runtime.onnx_session import OnnxSession, Port
from normfuse.runtime.shapes import Shapes
from normfuse.runtime.tensorrt_backend import Backend

__all__ = ["BuiltFile", "differing_outputs", "measure_built_files"]

Array = NDArray[Any]

SEED: Final = 0
"""Of the inputs that engines are run on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BuiltFile:
    """An engine and what it was built from.

    Attributes:
        label: what it is called.
        engine: its file.
        onnx: the ONNX file beside it.
        session: the same model in onnxruntime.
        via: what the engine was built from.
        shapes: of inputs with free axes, as the engine was built for.
    """

    label: str
    engine: Path
    onnx: Path
    session: OnnxSession
    via: Via = Via.ONNX
    shapes: Mapping[str, Shapes] = field(default_factory=dict)


def measure_built_files(
    files: Sequence[BuiltFile],
    backend: Backend,
    *,
    device: str,
    batch: int | None = None,
    trust: bool = False,
    schedule: GpuSchedule | None = None,
) -> dict[str, Any]:
    """Run and time engines in turns, on random inputs, and compare their outputs with onnxruntime's; as plain data.

    Outputs may differ by 128 roundings of the body's type, all in one direction, as in the compile's own check; those
    of a float32 engine by 128 of float16, because TensorRT multiplies float32 with as few bits (TF32) by default.

    Args:
        files: the engines, each label once.
        backend: the library that runs them.
        device: PyTorch's name of the GPU.
        batch: the first size of inputs with free axes; None: that of the usual shape.
        trust: engines without a sidecar are taken.
        schedule: how long to measure; None: as ``GpuSchedule`` has it.

    Raises:
        NormfuseError: as ``run_engines``, or inputs that onnxruntime does not take.
    """
    planned = schedule or GpuSchedule()
    feeds = {each.label: _feeds(each, batch) for each in files}
    jobs = [EngineJob(label=each.label, engine=each.engine, onnx=each.onnx, feeds=feeds[each.label]) for each in files]
    found = run_engines(jobs, backend, schedule=planned, trust=trust, device=device)
    first = found.runs[0]
    engines = [
        {
            "label": run.label,
            "inputs": {name: list(array.shape) for name, array in feeds[run.label].items()},
            **_closeness(file, run, file.session.run(feeds[run.label])),
            "graph": run.graph,
            "plain": run.plain,
            "no_graph": run.no_graph,
            "against_first": _ratio(first, run),
        }
        for file, run in zip(files, found.runs, strict=True)
    ]
    return {
        "engines": engines,
        "device": dict(found.device),
        "states": list(found.states),
        "schedule": asdict(planned),
    }


def differing_outputs(found: Mapping[str, Any]) -> CheckFailed | None:
    """Return the error of the first measured engine whose outputs are not onnxruntime's, if there is one."""
    for each in found["engines"]:
        if not each["output_error"] <= each["allowed_error"]:
            return CheckFailed(
                f"the engine's outputs differ from onnxruntime's by {each['output_error']:.2g} of the largest",
                where=each["label"],
                expected=f"at most {each['allowed_error']:.2g}",
                hint="another --body or --bits, or report it with the model",
            )
    return None


def _feeds(file: BuiltFile, batch: int | None) -> dict[str, Array]:
    wanted = [_wanted(port, file, batch) for port in file.session.inputs]
    sizes = [each.shape[0] for each in wanted if each.shape]
    return make_inputs(wanted, batch=(sizes[0] if sizes else None) or 1, seed=SEED)


def _wanted(port: Port, file: BuiltFile, batch: int | None) -> Wanted:
    """Return an input with its usual shape; what nobody knows (an engine without sidecar) is 1."""
    usual = file.shapes[port.name][1] if port.name in file.shapes else tuple(size or 1 for size in port.shape)
    if batch is not None and port.shape and port.shape[0] is None:
        usual = (batch, *usual[1:])
    if len(usual) != len(port.shape):
        raise BadInput(
            f"the engine's sidecar has the shape {list(usual)} for input {port.name}",
            where=str(file.engine),
            expected=str(port),
            hint="build the engine again",
        )
    return Wanted(port.name, tuple(usual), port.dtype)


def _closeness(file: BuiltFile, run: EngineRun, wanted: Mapping[str, Array]) -> dict[str, Any]:
    """Return the largest difference of any output, relative to its largest value, and what is allowed."""
    called = {name: f"output{index}" if file.via is Via.TORCH_TENSORRT else name for index, name in enumerate(wanted)}
    # An output that the engine lacks is infinitely far away.
    errors = {name: output_error(run.outputs.get(called[name], np.empty(0)), value) for name, value in wanted.items()}
    body = BodyType.BF16 if is_bfloat16(file.onnx) else BodyType.FP16
    return {"output_error": max(errors.values(), default=0.0), "allowed_error": rounding_allowed(body)}


def _ratio(first: EngineRun, run: EngineRun) -> float | None:
    """Return how many times as fast as the first one it is, round by round, recorded or (both) plain."""
    is_recorded = first.graph is not None and run.graph is not None
    rounds = [(each.graph if is_recorded else each.plain) or {} for each in (first, run)]
    pairs = zip(*(each["round_medians_ms"] for each in rounds), strict=True)
    return median(one / other for one, other in pairs) if first is not run else None
