"""Runs an ONNX file in onnxruntime: fixed threads, named arrays in and out, checked inputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from onnxruntime.capi.onnxruntime_inference_collection import InferenceSession
from onnxruntime.capi.onnxruntime_pybind11_state import GraphOptimizationLevel, SessionOptions, get_version_string

from normfuse.errors import BadInput

__all__ = ["AS_WRITTEN", "SESSION_ENTRIES", "OnnxSession", "Port", "open_onnx"]

Array = NDArray[Any]

SESSION_ENTRIES: Final = frozenset(
    {
        "optimization.disable_specified_optimizers",
        "session.disable_double_qdq_remover",
        "session.disable_prepacking",
        "session.disable_quant_qdq",
        "session.enable_dq_matmulnbits_fusion",
        "session.enable_quant_qdq_cleanup",
        "session.force_spinning_stop",
        "session.inter_op.allow_spinning",
        "session.intra_op.allow_spinning",
        "session.qdq_matmulnbits_accuracy_level",
        "session.qdqisint8allowed",
        "session.set_denormal_as_zero",
        "session.use_deterministic_compute",
        "session.x64quantprecision",
    }
)
"""The only entries accepted: they may come from a stranger's manifest, and others of onnxruntime's write files."""

AS_WRITTEN: Final = {
    "session.disable_quant_qdq": "1",
    "optimization.disable_specified_optimizers": "ReluQuantRewrite;ClipQuantRewrite",
}
"""With which onnxruntime computes quantizers as the file has them (1.31.1).

Else it fails on products of 8-bit floats and on a Clip in front of them, is wrong by hundreds of codes in convolutions
of codes between float16, and drops a Relu in front of a quantizer that writes 8-bit floats.
"""

OTHER_VERSION: Final = "build the artifact again with this version of onnxruntime installed"
NO_KERNELS: Final = "run its engine on its target: on processors onnxruntime has no kernels for some types, as bfloat16"

TYPES: Final[dict[str, np.dtype[Any]]] = {
    "tensor(float)": np.dtype(np.float32),
    "tensor(double)": np.dtype(np.float64),
    "tensor(float16)": np.dtype(np.float16),
    **{f"tensor({name})": np.dtype(name) for name in ("int8", "int16", "int32", "int64")},
    **{f"tensor({name})": np.dtype(name) for name in ("uint8", "uint16", "uint32", "uint64", "bool")},
}


@dataclass(frozen=True, slots=True)
class Port:
    """An input or output; None in ``shape`` is an axis of any size.

    ``axes`` names such axes (empty: no name); axes of one name have one size in all inputs.
    """

    name: str
    shape: tuple[int | None, ...]
    dtype: np.dtype[Any]
    axes: tuple[str, ...]

    def __str__(self) -> str:
        sizes = (
            name or ("any" if size is None else str(size)) for size, name in zip(self.shape, self.axes, strict=True)
        )
        return f"{self.name}: {self.dtype}[{', '.join(sizes)}]"


class OnnxSession:
    """A model ready to run: ``session(image=array)`` or ``session(array)`` gives a dict of arrays by name.

    ``inputs`` and ``outputs`` are ``Port`` values, ``path`` is the file.
    """

    def __init__(self, session: Any, path: Path) -> None:
        self._session = session
        self.path = path
        self.inputs = tuple(_port(found, path) for found in session.get_inputs())
        self.outputs = tuple(_port(found, path) for found in session.get_outputs())

    def __call__(self, *arrays: Array, **named: Array) -> dict[str, Array]:
        """Run on arrays given by position (in the order of the inputs), by name, or both.

        Raises:
            BadInput: as ``run``; also where there are more arrays than inputs, or one is given twice.
        """
        names = [port.name for port in self.inputs]
        twice = [name for name in names[: len(arrays)] if name in named]
        if len(arrays) > len(names) or twice:
            found = f"{len(arrays)} arrays by position" + (f", and {', '.join(twice)} by name too" if twice else "")
            raise BadInput(f"the call has {found}", where=self.path.name, expected=self._expected())
        return self.run({**dict(zip(names, arrays, strict=False)), **named})

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Return the outputs by name.

        Raises:
            BadInput: a name, shape or type does not fit, or onnxruntime cannot run the model on these arrays.
        """
        if set(feeds) != {port.name for port in self.inputs}:
            given = ", ".join(sorted(feeds)) or "none"
            raise BadInput(f"the inputs given are: {given}", where=self.path.name, expected=self._expected())
        sizes: dict[str, int] = {}
        for port in self.inputs:
            _check(port, feeds[port.name], sizes, self.path)
        try:
            values = self._session.run(None, dict(feeds))
        except Exception as error:  # onnxruntime's errors have no base class of their own
            raise BadInput(
                f"onnxruntime failed on these inputs: {_first_line(error)}",
                where=self.path.name,
                expected="sizes that every operator of the model can take",
            ) from error
        return {port.name: value for port, value in zip(self.outputs, values, strict=True)}

    def _expected(self) -> str:
        return "; ".join(str(port) for port in self.inputs)


def open_onnx(
    path: str | Path, *, threads: int | None = None, session_config: Mapping[str, str] | None = None
) -> OnnxSession:
    """Open an ONNX file on the CPU with all graph optimizations.

    Args:
        path: the file.
        threads: threads within an operator; None leaves the choice to onnxruntime.
        session_config: onnxruntime session entries, out of ``SESSION_ENTRIES``.

    Raises:
        BadInput: the file is missing, broken, or holds an operator that this onnxruntime cannot run; or an entry
            is not one of those accepted.
    """
    file = Path(path)
    if not file.is_file():
        raise BadInput("there is no such model", where=str(path), expected="an ONNX file")
    options = _options(threads, session_config or {}, file)
    try:
        session = InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's errors have no base class of their own
        raise BadInput(
            f"onnxruntime cannot open the model: {_first_line(error)}",
            where=str(path),
            expected=f"an ONNX model that onnxruntime {get_version_string()} can run",
            hint=NO_KERNELS if "NOT_IMPLEMENTED" in str(error) else OTHER_VERSION,
        ) from error
    return OnnxSession(session, file)


def _options(threads: int | None, entries: Mapping[str, str], file: Path) -> Any:
    options = SessionOptions()
    options.graph_optimization_level = GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 3
    options.inter_op_num_threads = 1
    if threads is not None:
        options.intra_op_num_threads = threads
    if unknown := sorted(set(entries) - SESSION_ENTRIES):
        raise BadInput(
            f"session entries that are not accepted: {', '.join(unknown)}",
            where=str(file),
            expected=f"some of {', '.join(sorted(SESSION_ENTRIES))}",
        )
    for key, value in entries.items():
        options.add_session_config_entry(key, value)
    return options


def _port(found: Any, path: Path) -> Port:
    if found.type not in TYPES:
        raise BadInput(
            f"{found.name} is a {found.type}", where=str(path), expected="inputs and outputs that are numpy arrays"
        )
    shape = tuple(size if isinstance(size, int) else None for size in found.shape)
    axes = tuple(size if isinstance(size, str) else "" for size in found.shape)
    return Port(found.name, shape, TYPES[found.type], axes)


def _check(port: Port, array: object, sizes: dict[str, int], path: Path) -> None:
    """Raise unless the array fits; ``sizes`` remembers what each named axis was."""
    if not isinstance(array, np.ndarray):
        found, hint = f"a {type(array).__name__}", "numpy.asarray(...), for a tensor .numpy()"
    elif array.dtype != port.dtype:
        found, hint = f"{array.dtype}{list(array.shape)}", f".astype(numpy.{port.dtype})"
    elif not _fits(port, array.shape, sizes):
        found, hint = f"{array.dtype}{list(array.shape)}", "one name stands for one size in all inputs" if sizes else ""
    else:
        return
    raise BadInput(f"input {port.name} is {found}", where=path.name, expected=str(port), hint=hint)


def _fits(port: Port, shape: tuple[int, ...], sizes: dict[str, int]) -> bool:
    if len(shape) != len(port.shape):
        return False
    for size, wanted, name in zip(shape, port.shape, port.axes, strict=True):
        expected = sizes.setdefault(name, size) if name else wanted
        if expected is not None and size != expected:
            return False
    return True


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
