"""The inputs and outputs of an ONNX file, read without its weights and without a runtime."""

from __future__ import annotations

from pathlib import Path

import onnx

from normfuse.errors import BadInput
from normfuse.runtime.onnx_session import Port

__all__ = ["read_ports"]


def read_ports(path: Path) -> tuple[tuple[Port, ...], tuple[Port, ...]]:
    """Return the inputs that have to be given and the outputs, in the file's order.

    Raises:
        BadInput: it is no ONNX file; or one of them is no tensor of numbers with a known number of axes.
    """
    try:
        graph = onnx.load(path, load_external_data=False).graph
    except Exception as error:  # protobuf has errors of its own for what is no model
        raise BadInput(f"{path.name} cannot be read as ONNX", where=str(path), expected="an ONNX model") from error
    constants = {tensor.name for tensor in graph.initializer}
    inputs = tuple(_port(value, path) for value in graph.input if value.name not in constants)
    return inputs, tuple(_port(value, path) for value in graph.output)


def _port(value: onnx.ValueInfoProto, path: Path) -> Port:
    kind = value.type.tensor_type
    known = value.type.HasField("tensor_type") and kind.HasField("shape")
    if not known or kind.elem_type in {onnx.TensorProto.UNDEFINED, onnx.TensorProto.STRING}:
        raise BadInput(
            f"nobody knows type and axes of {value.name}",
            where=str(path),
            expected="inputs and outputs that are tensors of numbers, with a shape",
        )
    shape = tuple(size.dim_value if size.HasField("dim_value") else None for size in kind.shape.dim)
    names = tuple(size.dim_param for size in kind.shape.dim)
    return Port(value.name, shape, onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type), names)
