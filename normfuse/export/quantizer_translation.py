"""How ``torch.ops.normfuse.*`` becomes QuantizeLinear and DequantizeLinear in the ONNX exporter."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import numpy as np
import onnx_ir as ir
import torch
from onnx.defs import OpSchema
from onnxscript import opset21 as op
from onnxscript.values import Op, Opset

from normfuse.kernels.ops import DEQUANTIZE, GROUPED_LINEAR, GROUPED_LOOKUP, QUANTIZE, QUANTIZE_FLOAT8, UNPACK
from normfuse.quant.dynamic_rows import ROUNDED_LEVEL
from normfuse.quant.integer_type import smallest_container

__all__ = ["translation_table"]

ORT: Final = Opset("com.microsoft", 1)


_KINDS: Final = [
    ("T", ["tensor(float)"], "floats"),
    ("C", ["tensor(uint8)", "tensor(int8)"], "codes"),
    ("I", ["tensor(int32)", "tensor(int64)"], "indices"),
]


def _operator(name: str, needed: Mapping[str, str], optional: Mapping[str, str], attributes: Sequence[str]) -> Op:
    """Return an operator of onnxruntime, whose schema onnx does not know: its inputs by kind, its integers by name."""
    parameter = OpSchema.FormalParameter
    may_miss = OpSchema.FormalParameterOption.Optional
    schema = OpSchema(
        name,
        ORT.domain,
        ORT.version,
        inputs=[
            *(parameter(each, kind) for each, kind in needed.items()),
            *(parameter(each, kind, param_option=may_miss) for each, kind in optional.items()),
        ],
        outputs=[parameter("Y", "T")],
        type_constraints=[kind for kind in _KINDS if kind[0] in {*needed.values(), *optional.values()}],
        attributes=[OpSchema.Attribute(each, OpSchema.AttrType.INT) for each in attributes],
    )
    return Op(ORT, schema.name, schema)


MATMUL_NBITS: Final = _operator(
    "MatMulNBits",
    {"A": "T", "B": "C", "scales": "T"},
    {"zero_points": "C", "g_idx": "I", "bias": "T"},
    ("K", "N", "bits", "block_size", "accuracy_level"),
)
"""A product of floats and codes of few bits."""

GATHER_BLOCK_QUANTIZED: Final = _operator(
    "GatherBlockQuantized",
    {"data": "C", "indices": "I", "scales": "T"},
    {"zero_points": "C"},
    ("gather_axis", "quantize_axis", "block_size"),
)
"""Rows of a table of codes of few bits, as floats."""

FEW: Final = 4

FLOAT_LEVEL: Final = 0
"""MatMulNBits' ``accuracy_level`` where it takes floats as they are."""

_TYPES: Final = {
    torch.uint8: ir.DataType.UINT8,
    torch.int8: ir.DataType.INT8,
    torch.uint16: ir.DataType.UINT16,
    torch.int16: ir.DataType.INT16,
}
"""What QuantizeLinear can produce; other ranges have no codes in ONNX."""


def translation_table() -> dict[Callable[..., Any], Callable[..., Any]]:
    """Return the ``custom_translation_table`` for ``torch.onnx.export(..., dynamo=True, opset_version=21)``.

    The codes of a constant stay an integer initializer: the exporter folds neither of the two operators. A zero point
    that already has the codes' type stays an initializer under its own name; any other gets a cast.
    """
    return {
        GROUPED_LINEAR: _grouped_linear,
        GROUPED_LOOKUP: _grouped_lookup,
        QUANTIZE: _quantize,
        QUANTIZE_FLOAT8: _quantize_float8,
        DEQUANTIZE: _dequantize,
        UNPACK: _unpack,
    }


# The exporter calls these with symbolic tensors (an untyped subclass of onnx_ir.Value) and Python integers.
def _quantize(x: Any, scale: Any, zero_point: Any, axis: int, minimum: int, maximum: int) -> Any:
    container = smallest_container(minimum, maximum)
    if container not in _TYPES:
        raise NotImplementedError(f"QuantizeLinear has no codes {minimum} ... {maximum}")
    dtype = _TYPES[container]
    codes = op.QuantizeLinear(x, scale, _as(dtype, zero_point), axis=max(axis, 0))
    limits = torch.iinfo(container)
    if (minimum, maximum) == (limits.min, limits.max):
        return codes
    # QuantizeLinear saturates at the ends of the container only; saturating the codes again is exact.
    return op.Clip(codes, _constant(minimum, dtype), _constant(maximum, dtype))


def _quantize_float8(x: Any, scale: Any, zero_point: Any, axis: int) -> Any:
    return op.QuantizeLinear(x, scale, zero_point, axis=max(axis, 0))


def _dequantize(codes: Any, scale: Any, zero_point: Any, axis: int) -> Any:
    return op.DequantizeLinear(codes, scale, _as(codes.dtype, zero_point), axis=max(axis, 0))


def _unpack(codes: Any, scale: Any) -> Any:
    """Write DequantizeLinear without a zero point, which the exporter leaves alone; see ``unpacked_at_loading``."""
    return op.DequantizeLinear(codes, scale, axis=0)


def _grouped_linear(  # noqa: PLR0913, PLR0917 - as the operator
    x: Any, codes: Any, scale: Any, zero_point: Any, bias: Any, size: int, rounds: bool
) -> Any:
    """Write onnxruntime's product of floats and packed codes, which ``pack_grouped_codes`` lays out."""
    outputs, inputs = codes.shape
    sizes = {"K": inputs, "N": outputs, "block_size": size, "bits": FEW}
    level = ROUNDED_LEVEL if rounds else FLOAT_LEVEL
    return MATMUL_NBITS(x, codes, scale, zero_point, None, bias, **sizes, accuracy_level=level)


def _grouped_lookup(codes: Any, scale: Any, indices: Any, size: int) -> Any:
    """Write onnxruntime's lookup in packed codes, which ``pack_grouped_codes`` lays out.

    Of an index that no row has it makes zeros without a word (onnxruntime 1.31.1). Gather refuses such an index, so
    the indices get what Gather finds for them in as many zeros added.
    """
    rows = codes.shape[0]
    zeros: Any = op.Constant(value=ir.serde.serialize_tensor(ir.tensor(np.zeros(rows, np.uint8))))
    found: Any = op.Gather(zeros, indices)
    known = op.Add(indices, op.Cast(found, to=int(indices.dtype)))
    return GATHER_BLOCK_QUANTIZED(codes, known, scale, gather_axis=0, quantize_axis=1, block_size=size)


def _as(dtype: ir.DataType, zero_point: Any) -> Any:
    return zero_point if zero_point.dtype == dtype else op.Cast(zero_point, to=int(dtype))


def _constant(value: int, dtype: ir.DataType) -> Any:
    return op.Constant(value=ir.serde.serialize_tensor(ir.tensor(value, dtype=dtype)))
