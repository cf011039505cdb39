"""Rules about codes of 8 bits: their types, zero points and scales."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import numpy as np
import onnx_ir as ir

from normfuse.export.lint.reading import (
    FLOATS,
    block_size,
    code_type,
    constant,
    input_of,
    is_of_weights,
    maker,
    nodes,
    quantizers,
    scales,
)
from normfuse.export.lint.rule import Level, LintRule, Site

__all__ = ["CODE_RULES"]

KNOWN: Final = frozenset(
    {ir.DataType.INT8, ir.DataType.INT4, ir.DataType.FLOAT8E4M3FN, ir.DataType.FLOAT4E2M1, ir.DataType.UINT8}
)
"""Types of codes that TensorRT reads; of uint8 the zero point is the trouble, or that int8 is meant."""

WEIGHTED: Final = ("MatMul", "Gemm", "Conv", "ConvTranspose")


def _zero_points(model: ir.Model) -> Iterator[Site]:
    for node in quantizers(model):
        zero = constant(input_of(node, 2))
        if zero is not None and bool(np.any(zero.numpy().astype(np.float32))):
            yield Site(node, f"zero point {zero.numpy().astype(np.float32).flat[0]:g}")


def _types(model: ir.Model) -> Iterator[Site]:
    for node in quantizers(model):
        kind = code_type(node)
        if kind is not None and kind not in KNOWN:
            yield Site(node, str(kind).lower())


def _untold_types(model: ir.Model) -> Iterator[Site]:
    for node in nodes(model, "QuantizeLinear"):
        if code_type(node) is None:
            yield Site(node)


def _unsigned(model: ir.Model) -> Iterator[Site]:
    for node in quantizers(model):
        if code_type(node) is ir.DataType.UINT8:
            yield Site(node)


def _by_hand(model: ir.Model) -> Iterator[Site]:
    for node in nodes(model, "Cast"):
        tensor = constant(node.inputs[0])
        if tensor is not None and tensor.dtype.bitwidth <= 8 and tensor.size > 1 and node.outputs[0].dtype in FLOATS:
            yield Site(node, f"{str(tensor.dtype).lower()} {list(tensor.shape)}")


def _scales_per_channel(model: ir.Model) -> Iterator[Site]:
    for node in quantizers(model):
        if not is_of_weights(node) and scales(node) > 1:
            yield Site(node, f"{scales(node)} scales")


def _computed_scales(model: ir.Model) -> Iterator[Site]:
    for node in quantizers(model):
        if constant(input_of(node, 1)) is None:
            yield Site(node)


def _blocks(model: ir.Model) -> Iterator[Site]:
    for node in nodes(model, "DequantizeLinear"):
        if block_size(node) and code_type(node) is ir.DataType.INT8:
            yield Site(node, f"blocks of {block_size(node)}")


def _one_sided(model: ir.Model) -> Iterator[Site]:
    for node in nodes(model, *WEIGHTED):
        x, weight = (maker(input_of(node, index)) for index in (0, 1))
        if weight is None or weight.op_type != "DequantizeLinear" or not is_of_weights(weight):
            continue
        reads_floats = x is None or x.op_type != "DequantizeLinear"
        if reads_floats and code_type(weight) is ir.DataType.INT8:
            yield Site(node)


def _scales_along_inputs(model: ir.Model) -> Iterator[Site]:
    for node in nodes(model, *WEIGHTED):
        value = input_of(node, 1)
        made = None if value is None else value.producer()
        is_turned = made is not None and made.op_type == "Transpose"
        if made is not None and is_turned and made.inputs[0] is not None:
            made = made.inputs[0].producer()
        if made is None or made.op_type != "DequantizeLinear" or not is_of_weights(made) or block_size(made):
            continue
        if scales(made) > 1 and _axis(made) == _summed_axis(node, is_turned):
            yield Site(node, f"{scales(made)} scales")


def _axis(node: ir.Node) -> int | None:
    """Return the axis that a quantizer's scales run along, from the last; None where the rank is not known."""
    given, shape = node.attributes.get("axis"), node.outputs[0].shape
    axis = 1 if given is None else given.as_int()
    return axis if axis < 0 else None if shape is None else axis - len(shape)


def _summed_axis(node: ir.Node, is_turned: bool) -> int | None:
    """Return the axis of a product's weights, as they are dequantized, that it sums over, from the last."""
    if node.op_type in ("Conv", "ConvTranspose"):
        value = input_of(node, 1)
        rank = None if value is None or value.shape is None else len(value.shape)
        return None if rank is None or is_turned else (1 if node.op_type == "Conv" else 0) - rank
    given = node.attributes.get("transB")
    return -1 if is_turned != (given is not None and bool(given.as_int())) else -2


CODE_RULES: Final = (
    LintRule(
        name="zero-point",
        level=Level.ERROR,
        says="codes have a zero point that is not 0",
        mend="use symmetric codes",
        find=_zero_points,
    ),
    LintRule(
        name="code-type",
        level=Level.ERROR,
        says="codes have a type that TensorRT does not dequantize",
        mend="use int8, int4 or float8e4m3fn, and leave biases float",
        find=_types,
    ),
    LintRule(
        name="untold-code-type",
        level=Level.ERROR,
        says="a quantizer has neither zero point nor type: ONNX reads uint8, TensorRT int8",
        mend="write a zero point of type int8",
        find=_untold_types,
    ),
    LintRule(
        name="unsigned-codes",
        level=Level.ERROR,
        says="codes are uint8, which TensorRT takes for int8",
        mend="use int8",
        find=_unsigned,
    ),
    LintRule(
        name="codes-by-hand",
        level=Level.ERROR,
        says="codes of weights are cast to floats instead of dequantized",
        mend="use DequantizeLinear",
        find=_by_hand,
    ),
    LintRule(
        name="scale-per-channel",
        level=Level.ERROR,
        says="codes of activations have several scales, so what reads them computes floats",
        mend="use one scale per tensor of activations",
        find=_scales_per_channel,
    ),
    LintRule(
        name="scale-along-inputs",
        level=Level.WARNING,
        says="8-bit weights have a scale per input, which no product of codes can use, so it computes floats",
        mend="use one scale per output channel",
        find=_scales_along_inputs,
    ),
    LintRule(
        name="computed-scale",
        level=Level.ERROR,
        says="a scale is computed while the engine runs",
        mend="use static scales",
        find=_computed_scales,
    ),
    LintRule(
        name="int8-blocks",
        level=Level.WARNING,
        says="8-bit weights in blocks are dequantized by a kernel of their own",
        mend="use one scale per output channel",
        find=_blocks,
    ),
    LintRule(
        name="one-sided",
        level=Level.WARNING,
        says="a product has 8-bit weights and reads floats, so it computes floats",
        mend="quantize its input too",
        find=_one_sided,
    ),
)
