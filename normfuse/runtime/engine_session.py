"""Runs a TensorRT engine on a GPU: checked before it is loaded, inputs and outputs in memory that PyTorch holds."""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from normfuse.errors import BadInput, CheckFailed, UnsupportedModel
from normfuse.runtime.engine_sidecar import check_engine
from normfuse.runtime.tensorrt_child import recording_logger

__all__ = ["EngineSession", "compute_capability", "open_engine"]

Array = NDArray[Any]

DTYPES: Final = {
    "FLOAT": torch.float32,
    "HALF": torch.float16,
    "BF16": torch.bfloat16,
    "INT8": torch.int8,
    "UINT8": torch.uint8,
    "INT32": torch.int32,
    "INT64": torch.int64,
    "BOOL": torch.bool,
}
"""By the name of the library's ``DataType``; codes of fewer bits are no inputs or outputs."""


class EngineSession:
    """An engine with its inputs and outputs on a device: ``give`` once, then ``enqueue`` as often as wanted."""

    def __init__(self, trt: Any, engine: Any, device: torch.device, *, where: str, messages: list[str]) -> None:
        self._engine, self._device, self._where, self._messages = engine, device, where, messages
        self._context = _context(trt, engine)
        if self._context is None:
            raise UnsupportedModel(
                f"the engine cannot be run: {self._said()}", where=where, expected="memory for its activations"
            )
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        modes = {name: engine.get_tensor_mode(name) for name in names}
        self._inputs = [name for name in names if modes[name] == trt.TensorIOMode.INPUT]
        self._outputs = [name for name in names if modes[name] == trt.TensorIOMode.OUTPUT]
        self._host = trt.TensorLocation.HOST
        self._held = dict[str, Tensor]()

    def give(self, feeds: Mapping[str, Array]) -> None:
        """Copy the inputs to the device and make room for the outputs.

        Raises:
            BadInput: a name, type or shape does not fit the engine.
            UnsupportedModel: the shape of an output depends on values.
        """
        if set(feeds) != set(self._inputs):
            raise BadInput(
                f"the inputs given are: {', '.join(sorted(feeds)) or 'none'}",
                where=self._where,
                expected=", ".join(self._inputs),
                hint="inputs by the names that the engine has",
            )
        for name in self._inputs:
            self._hold(name, self._checked(name, feeds[name]).to(self._place(name)))
        for name in self._outputs:
            self._hold(name, torch.empty(self._shape(name), dtype=self._dtype(name), device=self._place(name)))

    def enqueue(self) -> None:
        """Enqueue one inference on PyTorch's current stream.

        Raises:
            CheckFailed: the engine takes no inference.
        """
        stream = torch.cuda.current_stream(self._device).cuda_stream if self._device.type == "cuda" else 0
        if not self._context.execute_async_v3(stream):
            raise CheckFailed(
                f"the engine does not run: {self._said()}",
                where=self._where,
                expected="an inference",
                hint="a GPU with free memory; or build the engine again",
            )

    def outputs(self) -> dict[str, Array]:
        """Return the outputs of the last inference, after it is done; those in bfloat16 as float32."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        held = {name: self._held[name].cpu() for name in self._outputs}
        return {name: (each.float() if each.dtype == torch.bfloat16 else each).numpy() for name, each in held.items()}

    @property
    def is_recordable(self) -> bool:
        """Whether the library says that a CUDA graph can hold an inference; TensorRT says nothing before it tries."""
        asks = getattr(self._context, "is_stream_capturable", None)
        return asks is None or bool(asks(torch.cuda.current_stream(self._device).cuda_stream))

    def _checked(self, name: str, array: Array) -> Tensor:
        """Return an input as a tensor on the host, after its shape was told to the engine."""
        tensor, wanted = torch.from_numpy(np.ascontiguousarray(array)), self._dtype(name)
        if tensor.dtype != wanted:
            raise BadInput(f"input {name} is {array.dtype}", where=self._where, expected=str(wanted))
        if not self._context.set_input_shape(name, tuple(array.shape)):
            raise BadInput(
                f"input {name} has the shape {list(array.shape)}: {self._said()}",
                where=self._where,
                expected="a shape that the engine was built for",
                hint="other shapes, or an engine for these (--shapes)",
            )
        return tensor

    def _hold(self, name: str, tensor: Tensor) -> None:
        self._held[name] = tensor
        if not self._context.set_tensor_address(name, tensor.data_ptr()):
            raise CheckFailed(
                f"the engine does not take the memory of {name}: {self._said()}",
                where=self._where,
                expected="an address of its device",
                hint="build the engine again",
            )

    def _shape(self, name: str) -> tuple[int, ...]:
        shape = tuple(self._context.get_tensor_shape(name))
        if any(size < 0 for size in shape):
            raise UnsupportedModel(
                f"the shape of output {name} depends on values", where=self._where, expected="shapes of inputs alone"
            )
        return shape

    def _dtype(self, name: str) -> torch.dtype:
        kind = self._engine.get_tensor_dtype(name).name
        if kind not in DTYPES:
            raise UnsupportedModel(f"{name} is {kind}", where=self._where, expected=f"one of {', '.join(DTYPES)}")
        return DTYPES[kind]

    def _place(self, name: str) -> torch.device:
        """Return where a tensor lies: what decides shapes is read by the host."""
        is_on_host = self._engine.get_tensor_location(name) == self._host
        return torch.device("cpu") if is_on_host else self._device

    def _said(self) -> str:
        return self._messages[-1] if self._messages else "it does not say why"


def open_engine(
    path: Path, module: str, *, device: torch.device, onnx: Path | None = None, trust: bool = False
) -> EngineSession:
    """Load an engine if its sidecar is this engine's and fits library, GPU and ONNX file.

    An engine is native code: what is loaded runs in this process.

    Args:
        path: the engine's file.
        module: the library that runs it, which must be installed.
        device: where it runs. The GPU's compute capability is compared with what the engine was built for.
        onnx: the ONNX file that it must have been built from; None: it is not compared.
        trust: an engine without a sidecar is taken.

    Raises:
        BadInput: as ``check_engine``, or the library does not load the engine.
        UnsupportedModel: there is no room for its activations.
    """
    trt = _imported(module)
    capability = compute_capability(device)
    sidecar = check_engine(
        path, backend_module=module, backend_version=trt.__version__, capability=capability, onnx=onnx, trust=trust
    )
    plan = path.read_bytes()
    if sidecar is not None and hashlib.sha256(plan).hexdigest() != sidecar.sha256:
        raise BadInput(
            "the engine was replaced while it was checked",
            where=str(path),
            expected="the same file",
            hint="try again when nothing writes into the folder",
        )
    logger = recording_logger(trt)
    engine = trt.Runtime(logger).deserialize_cuda_engine(plan)
    if engine is None:
        raise BadInput(
            f"{module} {trt.__version__} does not load the engine: {' / '.join(logger.errors[-1:]) or 'no word why'}",
            where=str(path),
            expected=f"an engine for {capability or 'this device'}",
            hint="build the engine here; a version-compatible one needs the lean runtime of the version that built it",
        )
    return EngineSession(trt, engine, device, where=path.name, messages=logger.errors)


def _imported(module: str) -> Any:
    """Return the library; a library of its own that is missing is an ImportError, as the module itself."""
    try:
        return importlib.import_module(module)
    except OSError as error:
        raise ImportError(str(error)) from error


def compute_capability(device: torch.device) -> str | None:
    """Return a GPU's compute capability as sidecars have it (``SM89``); None of what is no GPU."""
    if device.type != "cuda":
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return f"SM{major}{minor}"


def _context(trt: Any, engine: Any) -> Any:
    """Return what runs the engine; of TensorRT-RTX with kernels made for the shapes before the first inference.

    It would else make them beside the inferences that are timed, and swap them in.
    """
    strategies = getattr(trt, "DynamicShapesKernelSpecializationStrategy", None)
    if strategies is None:
        return engine.create_execution_context()
    config = engine.create_runtime_config()
    config.dynamic_shapes_kernel_specialization_strategy = strategies.EAGER
    return engine.create_execution_context(config)
