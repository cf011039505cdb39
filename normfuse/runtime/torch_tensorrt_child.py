"""Builds one engine by torch-tensorrt, in a process of its own: ``python torch_tensorrt_child.py REQUEST.json``.

Requests and answers are those of ``tensorrt_child``; what is read is a torch.export archive in place of an ONNX file.
This file is run as a script and imports nothing of normfuse. What torch-tensorrt takes and does was read in the source
of its version 2.13.0.
"""

from __future__ import annotations

import importlib
import json
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch
import torch.export.passes
from torch.export import ExportedProgram

Shapes = Mapping[Any, Sequence[Sequence[int]]]
"""The smallest, the usual and the largest shape of every input with a free axis, by its name."""

RUNS_ON: Final = "tensorrt"
"""The library whose engines are built; torch-tensorrt-rtx has the same module, and builds TensorRT-RTX's."""

GPU: Final = "cuda:0"
UNSUPPORTED: Final = "UnsupportedOperatorException"
"""What torch-tensorrt raises where it has no converter; the class lies in a private module."""


def main(request_file: str) -> None:
    """Do what a request says and write the answer beside it."""
    request = json.loads(Path(request_file).read_text(encoding="utf-8"))
    answer = _built(_imported(request["module"]), request)
    Path(request["answer"]).write_text(json.dumps(answer), encoding="utf-8")


def _imported(module: str) -> Any:
    """Return torch-tensorrt, or end with an ImportError that says in one line what is missing."""
    try:
        found = importlib.import_module(module)
    except Exception as error:  # without libnvinfer a bare one, with a torch without CUDA an AssertionError
        raise ImportError(f"{type(error).__name__}: {_first_line(error)}") from error
    if found.tensorrt_package_name != RUNS_ON:
        raise ImportError(f"{module} is that of {found.tensorrt_package_name}; install torch-tensorrt")
    return found


def _built(torch_tensorrt: Any, request: dict[str, Any]) -> dict[str, Any]:
    recording = _recording()
    version = importlib.import_module(RUNS_ON).__version__
    answer = {"version": version, "messages": recording.messages, "errors": recording.errors}
    if request["capabilities"]:  # it builds for the GPU at hand
        return {**answer, "outcome": "no such capability", "known": []}
    program = torch.export.load(request["model"])
    if misfit := _misfit(program, request["shapes"]):
        recording.keep(logging.ERROR, misfit)
        return {**answer, "outcome": "not built"}
    try:
        plan = _converted(torch_tensorrt, program, request)
    except Exception as error:  # noqa: BLE001 - a converter raises whatever it meets
        recording.keep(logging.ERROR, _first_line(list(_causes(error))[-1]))
        return {**answer, "outcome": _outcome(error)}
    if not plan:
        return {**answer, "outcome": "not built"}
    Path(request["engine"]).write_bytes(plan)
    return {**answer, "outcome": "built", "layers": [], "capabilities": _capabilities()}


class _Recording(logging.Handler):
    """Keeps warnings and errors of torch-tensorrt and of the builder, which logs through it; the errors alone too."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []
        self.errors: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.name.startswith("torch_tensorrt"):
            self.keep(record.levelno, _first_line(record.getMessage()))

    def keep(self, level: int, text: str) -> None:
        self.messages.append(text)
        if level >= logging.ERROR:
            self.errors.append(text)


def _recording() -> _Recording:
    recording = _Recording()
    # Standard error has them too: it is what is left of a process that ends.
    logging.basicConfig(handlers=[logging.StreamHandler(), recording], force=True)
    return recording


def _converted(torch_tensorrt: Any, program: ExportedProgram, request: dict[str, Any]) -> bytes | None:
    """Return one engine of the whole program: this function of torch-tensorrt leaves nothing to PyTorch."""
    if torch.cuda.is_available():
        program = torch.export.passes.move_to_device_pass(program, GPU)
    plan: bytes | None = torch_tensorrt.dynamo.convert_exported_program_to_serialized_trt_engine(
        program,
        arg_inputs=_inputs(torch_tensorrt, program, request["shapes"]),
        workspace_size=request["workspace_bytes"],
        optimization_level=request["level"],
        version_compatible=request["version_compatible"],
        # The default is one file for everybody on the machine.
        timing_cache_path=request["timing_cache"] or str(Path(request["engine"]).with_suffix(".timings")),
        truncate_double=True,  # of constants, as TensorRT's parser of ONNX does
        attn_bias_is_causal=False,  # else any mask of square attention counts as causal
    )
    return plan


def _misfit(program: ExportedProgram, shapes: Shapes) -> str:
    """Return what of the inputs and outputs no engine can have; nothing where all can be."""
    values = _values(program)
    inputs, outputs = (
        [name for name in names if name in values]
        for names in (program.graph_signature.user_inputs, program.graph_signature.user_outputs)
    )
    for name in inputs:
        if name not in shapes and not all(isinstance(size, int) for size in values[name].shape):
            return f"the input {name} has a free axis, and no optimization profile says of which sizes"
    for name in (*inputs, *outputs):
        if values[name].dtype is torch.float64:
            return f"{name} is float64, which TensorRT does not have"
    for name in outputs:
        if name in inputs or outputs.count(name) > 1:  # it drops the second, and gives the input the output's name
            return f"{name} is returned although it is an input, or returned twice, which torch-tensorrt cannot"
    return ""


def _inputs(torch_tensorrt: Any, program: ExportedProgram, shapes: Shapes) -> list[Any]:
    """Return what torch-tensorrt is told of the inputs, in their order; those with shapes have free axes."""
    values = _values(program)
    return [
        _input(torch_tensorrt.Input, values[name], shapes.get(name)) for name in program.graph_signature.user_inputs
    ]


def _input(made: Any, value: torch.Tensor, shapes: Sequence[Sequence[int]] | None) -> Any:
    if shapes is None:
        return made(shape=tuple(value.shape), dtype=value.dtype)
    least, usual, most = (tuple(shape) for shape in shapes)
    return made(min_shape=least, opt_shape=usual, max_shape=most, dtype=value.dtype)


def _values(program: ExportedProgram) -> dict[Any, torch.Tensor]:
    """Return what stands for the value of every node, by its name: type and shape without data."""
    return {node.name: node.meta["val"] for node in program.graph.nodes if "val" in node.meta}


def _outcome(error: Exception) -> str:
    if any(type(each).__name__ == UNSUPPORTED for each in _causes(error)):
        return "not converted"
    return "not built" if torch.cuda.is_available() else "no builder"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and what caused it, the first cause last: errors around it repeat the whole network."""
    while error is not None:
        yield error
        error = error.__cause__


def _first_line(said: object) -> str:
    return next(iter(str(said).strip().splitlines()), type(said).__name__)


def _capabilities() -> list[str]:
    if not torch.cuda.is_available():
        return []
    major, minor = torch.cuda.get_device_capability(GPU)
    return [f"SM{major}{minor}"]


if __name__ == "__main__":
    main(sys.argv[1])
