"""Runs one call of an integer operator as its torch reference, or as an ONNX file of one node in stock onnxruntime."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, Final

import onnx
import onnx_ir as ir
import torch
from onnx import helper, numpy_helper
from onnxruntime.capi.onnxruntime_inference_collection import InferenceSession
from onnxruntime.capi.onnxruntime_pybind11_state import SessionOptions
from torch import Tensor

from normfuse.export.integer_translation import integer_call
from normfuse.kernels.integer_ops import INTEGER_OPERATORS
from normfuse.kernels.onnx_functions import DOMAIN, VERSION, onnx_functions

__all__ = ["IR_VERSION", "OPSET", "assert_identical", "call_function", "onnx_result", "session_of", "torch_result"]

OPSET: Final = 21
IR_VERSION: Final = 10

TYPES: Final = {
    torch.int8: onnx.TensorProto.INT8,
    torch.int16: onnx.TensorProto.INT16,
    torch.int32: onnx.TensorProto.INT32,
    torch.int64: onnx.TensorProto.INT64,
}

Attributes = Mapping[str, int | Sequence[int]]
Frozen = tuple[tuple[str, int | tuple[int, ...]], ...]


def torch_result(name: str, arguments: Mapping[str, Any]) -> Tensor:
    """Return what the torch operator computes; ``arguments`` are by the names of its schema."""
    result: Tensor = INTEGER_OPERATORS[name](**arguments)
    return result


def onnx_result(name: str, arguments: Mapping[str, Any], *, stored_from: int | None = None) -> Tensor:
    """Return what onnxruntime computes for the same call; tensors from ``stored_from`` on are constants of the file."""
    function, inputs, attributes = integer_call(INTEGER_OPERATORS[name], arguments)
    return call_function(function, inputs, attributes, stored_from=stored_from)


def call_function(
    function: str, inputs: Sequence[Tensor], attributes: Attributes, *, stored_from: int | None = None
) -> Tensor:
    """Return what onnxruntime computes for a node that calls one of our ONNX functions."""
    given = len(inputs) if stored_from is None else stored_from
    frozen: Frozen = tuple((key, v if isinstance(v, int) else tuple(v)) for key, v in sorted(attributes.items()))
    types = tuple(each.dtype for each in inputs[:given])
    if stored := inputs[given:]:
        session = session_of(_model(function, frozen, types, stored))
    else:
        session = _cached_session(function, frozen, types)
    (codes,) = session.run(None, {f"x{index}": each.numpy() for index, each in enumerate(inputs[:given])})
    return torch.from_numpy(codes)


def session_of(model: onnx.ModelProto, *, threads: int = 1) -> InferenceSession:
    """Return the model in onnxruntime, on the CPU."""
    options = SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    return InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def assert_identical(found: Tensor, expected: Tensor) -> None:
    """Fail unless shape, type and every code are the same."""
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    wrong = (found != expected).nonzero()
    assert not len(wrong), f"{len(wrong)} of {found.numel()} codes differ, the first at {wrong[0].tolist()}"


@lru_cache(maxsize=512)
def _cached_session(function: str, attributes: Frozen, types: tuple[torch.dtype, ...]) -> InferenceSession:
    return session_of(_model(function, attributes, types, ()))


def _model(
    function: str, attributes: Frozen, types: Sequence[torch.dtype], stored: Sequence[Tensor]
) -> onnx.ModelProto:
    names = [f"x{index}" for index in range(len(types) + len(stored))]
    options: dict[str, Any] = dict(attributes)
    node = helper.make_node(function, names, ["codes"], domain=DOMAIN, **options)
    graph = helper.make_graph(
        [node],
        function,
        [helper.make_tensor_value_info(name, TYPES[each], None) for name, each in zip(names, types, strict=False)],
        [onnx.ValueInfoProto(name="codes")],  # onnxruntime finds the type; a wrong one shall be seen
        [numpy_helper.from_array(each.numpy(), name) for name, each in zip(names[len(types) :], stored, strict=True)],
    )
    return helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, VERSION)],
        functions=[ir.serde.serialize_function(each) for each in onnx_functions({function})],
        ir_version=IR_VERSION,
    )
