"""Each integer operator as an ONNX function of standard integer operators, so that any onnxruntime runs the file.

The bodies do what ``normfuse.kernels.reference`` says, bit for bit. Three things differ in form:

- Operands of products become unsigned, 128 higher, with 128 as their zero point. onnxruntime multiplies uint8 by uint8
  exactly on every processor; uint8 by int8 saturates in 16 bits where there is no VNNI, and int8 by int8 is slow.
- ONNX shifts unsigned integers only, so what is shifted is made positive by 2^62 first.
- The larger of two int64 is found by comparing them (``normfuse.kernels.onnx_rescaling`` says why).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import onnx_ir as ir
from onnxscript import script
from onnxscript.values import OnnxFunction

from normfuse.kernels.onnx_attention_functions import ATTENTION_FUNCTIONS
from normfuse.kernels.onnx_domain import DOMAIN, INT8, INT32, INT64, UINT8, VERSION, normfuse, op
from normfuse.kernels.onnx_norm_functions import NORM_FUNCTIONS
from normfuse.kernels.onnx_rescaling import RESCALING
from normfuse.kernels.onnx_shift_functions import SHIFT_FUNCTIONS
from normfuse.kernels.onnx_token_functions import TOKEN_FUNCTIONS

__all__ = ["DOMAIN", "FUNCTIONS", "VERSION", "onnx_functions"]


@script(normfuse, default_opset=op)
def requantize(x, bias, multiplier, shift: int, zero_point: int, minimum: int, maximum: int, to: int):
    """Return codes of x at another scale."""
    return normfuse.rescale(
        x, bias, multiplier, shift=shift, zero_point=zero_point, minimum=minimum, maximum=maximum, to=to
    )


@script(normfuse, default_opset=op)
def int_add(
    x,
    y,
    x_multiplier: int,
    y_multiplier: int,
    offset: int,
    shift: int,
    zero_point: int,
    minimum: int,
    maximum: int,
    to: int,
):
    """Return codes of x + y."""
    first = op.Mul(op.Cast(x, to=INT64), op.Constant(value_int=x_multiplier))
    second = op.Mul(op.Cast(y, to=INT64), op.Constant(value_int=y_multiplier))
    total = op.Add(op.Add(first, second), op.Constant(value_int=offset))
    rounded = normfuse.rounded_shift(total, shift=shift)
    return normfuse.saturate(rounded, zero_point=zero_point, minimum=minimum, maximum=maximum, to=to)


@script(normfuse, default_opset=op)
def int_multiply(
    x,
    y,
    x_zero_point: int,
    y_zero_point: int,
    multiplier: int,
    shift: int,
    zero_point: int,
    minimum: int,
    maximum: int,
    to: int,
):
    """Return codes of x * y."""
    first = op.Sub(op.Cast(x, to=INT64), op.Constant(value_int=x_zero_point))
    second = op.Sub(op.Cast(y, to=INT64), op.Constant(value_int=y_zero_point))
    scaled = op.Mul(op.Mul(first, second), op.Constant(value_int=multiplier))
    rounded = normfuse.rounded_shift(scaled, shift=shift)
    return normfuse.saturate(rounded, zero_point=zero_point, minimum=minimum, maximum=maximum, to=to)


@script(normfuse, default_opset=op)
def int_mean(
    x,
    axes: Sequence[int],
    keeps_axes: int,
    offset: int,
    multiplier: int,
    shift: int,
    zero_point: int,
    minimum: int,
    maximum: int,
    to: int,
):
    """Return codes of a mean of x."""
    total = op.ReduceSum(op.Cast(x, to=INT64), op.Constant(value_ints=axes), keepdims=keeps_axes)
    scaled = op.Mul(op.Add(total, op.Constant(value_int=offset)), op.Constant(value_int=multiplier))
    rounded = normfuse.rounded_shift(scaled, shift=shift)
    return normfuse.saturate(rounded, zero_point=zero_point, minimum=minimum, maximum=maximum, to=to)


@script(normfuse, default_opset=op)
def unsigned(x):
    """Return int8 x + 128 as uint8."""
    return op.Cast(op.Add(op.Cast(x, to=INT32), op.Cast(op.Constant(value_int=128), to=INT32)), to=UINT8)


@script(normfuse, default_opset=op)
def product(x, y):
    """Return the exact int32 matrix product of int8 x and y."""
    middle = op.Cast(op.Constant(value_int=128), to=UINT8)
    return op.MatMulInteger(normfuse.unsigned(x), normfuse.unsigned(y), middle, middle)


@script(normfuse, default_opset=op)
def int_linear(x, weight, bias, multiplier, shift: int, zero_point: int, minimum: int, maximum: int, to: int):
    """Return codes of x W^T + b."""
    sums = normfuse.product(x, op.Transpose(weight, perm=[1, 0]))
    return normfuse.rescale(
        sums, bias, multiplier, shift=shift, zero_point=zero_point, minimum=minimum, maximum=maximum, to=to
    )


@script(normfuse, default_opset=op)
def with_residual(
    sums,
    bias,
    multiplier,
    residual,
    residual_multiplier: int,
    shift: int,
    zero_point: int,
    minimum: int,
    maximum: int,
    to: int,
):
    """Return codes of what sums stand for plus a residual."""
    own = op.Mul(op.Add(op.Cast(sums, to=INT64), op.Cast(bias, to=INT64)), op.Cast(multiplier, to=INT64))
    other = op.Mul(op.Cast(residual, to=INT64), op.Constant(value_int=residual_multiplier))
    rounded = normfuse.rounded_shift(op.Add(own, other), shift=shift)
    return normfuse.saturate(rounded, zero_point=zero_point, minimum=minimum, maximum=maximum, to=to)


@script(normfuse, default_opset=op)
def int_linear_add(
    x,
    weight,
    bias,
    multiplier,
    residual,
    residual_multiplier: int,
    shift: int,
    zero_point: int,
    minimum: int,
    maximum: int,
    to: int,
):
    """Return codes of x W^T + b + residual."""
    return normfuse.with_residual(
        normfuse.product(x, op.Transpose(weight, perm=[1, 0])),
        bias,
        multiplier,
        residual,
        residual_multiplier=residual_multiplier,
        shift=shift,
        zero_point=zero_point,
        minimum=minimum,
        maximum=maximum,
        to=to,
    )


@script(normfuse, default_opset=op)
def int_table(x, table):
    """Return table[x + 128]."""
    return op.Gather(table, op.Add(op.Cast(x, to=INT32), op.Cast(op.Constant(value_int=128), to=INT32)))


@script(normfuse, default_opset=op)
def int_linear_table(x, weight, bias, multiplier, table, shift: int, zero_point: int):
    """Return a function of x W^T + b, by its table."""
    codes = normfuse.int_linear(
        x, weight, bias, multiplier, shift=shift, zero_point=zero_point, minimum=-128, maximum=127, to=INT8
    )
    return normfuse.int_table(codes, table)


@script(normfuse, default_opset=op)
def convolved(
    x, weight, strides: Sequence[int], pads: Sequence[int], dilations: Sequence[int], group: int, x_zero_point: int
):
    """Return the exact int32 convolution of x - x_zero_point."""
    middle = op.Constant(value_int=128)
    zero = op.Cast(op.Add(op.Constant(value_int=x_zero_point), middle), to=UINT8)
    return op.ConvInteger(
        normfuse.unsigned(x),
        normfuse.unsigned(weight),
        zero,
        op.Cast(middle, to=UINT8),
        strides=strides,
        pads=pads,
        dilations=dilations,
        group=group,
    )


@script(normfuse, default_opset=op)
def of_channels(x):
    """Return a vector as [channels, 1, 1]."""
    return op.Reshape(x, op.Constant(value_ints=[-1, 1, 1]))


@script(normfuse, default_opset=op)
def int_conv2d(
    x,
    weight,
    bias,
    multiplier,
    strides: Sequence[int],
    pads: Sequence[int],
    dilations: Sequence[int],
    group: int,
    x_zero_point: int,
    shift: int,
    zero_point: int,
    minimum: int,
    maximum: int,
    to: int,
):
    """Return codes of a convolution."""
    sums = normfuse.convolved(
        x, weight, strides=strides, pads=pads, dilations=dilations, group=group, x_zero_point=x_zero_point
    )
    return normfuse.rescale(
        sums,
        normfuse.of_channels(bias),
        normfuse.of_channels(multiplier),
        shift=shift,
        zero_point=zero_point,
        minimum=minimum,
        maximum=maximum,
        to=to,
    )


@script(normfuse, default_opset=op)
def int_conv2d_add(
    x,
    weight,
    bias,
    multiplier,
    residual,
    strides: Sequence[int],
    pads: Sequence[int],
    dilations: Sequence[int],
    group: int,
    x_zero_point: int,
    residual_multiplier: int,
    shift: int,
    zero_point: int,
    minimum: int,
    maximum: int,
    to: int,
):
    """Return codes of a convolution plus a residual."""
    return normfuse.with_residual(
        normfuse.convolved(
            x, weight, strides=strides, pads=pads, dilations=dilations, group=group, x_zero_point=x_zero_point
        ),
        normfuse.of_channels(bias),
        normfuse.of_channels(multiplier),
        residual,
        residual_multiplier=residual_multiplier,
        shift=shift,
        zero_point=zero_point,
        minimum=minimum,
        maximum=maximum,
        to=to,
    )


@script(normfuse, default_opset=op)
def int_matmul(x, y, multiplier: int, shift: int, zero_point: int, minimum: int, maximum: int, to: int):
    """Return codes of the product of two activations."""
    return normfuse.rescale(
        normfuse.product(x, y),
        op.Constant(value_int=0),
        op.Constant(value_int=multiplier),
        shift=shift,
        zero_point=zero_point,
        minimum=minimum,
        maximum=maximum,
        to=to,
    )


@script(normfuse, default_opset=op)
def int_interpolate(x, low, high, weight, axis: int):
    """Return codes between two neighbours along an axis."""
    wide = op.Cast(x, to=INT64)
    before = op.Gather(wide, low, axis=axis)
    behind = op.Gather(wide, high, axis=axis)
    moved = op.Mul(op.Sub(behind, before), op.Cast(weight, to=INT64))
    total = op.Add(op.Mul(before, op.Constant(value_int=16384)), moved)
    return op.CastLike(normfuse.rounded_shift(total, shift=14), x)


FUNCTIONS: Final[Mapping[str, OnnxFunction[..., Any]]] = {
    each.name: each
    for each in (
        *(*RESCALING, unsigned, product, with_residual, convolved, of_channels),
        *(requantize, int_add, int_multiply, int_mean, int_table, int_interpolate),
        *(int_linear, int_linear_add, int_linear_table, int_conv2d, int_conv2d_add, int_matmul),
        *ATTENTION_FUNCTIONS,
        *NORM_FUNCTIONS,
        *TOKEN_FUNCTIONS,
        *SHIFT_FUNCTIONS,
    )
}
"""By name: the operators, and the parts that they share."""


def onnx_functions(operators: set[str]) -> list[ir.Function]:
    """Return what an ONNX file needs that calls these operators: them and, in turn, what they call."""
    found, wanted = dict[str, ir.Function](), list(operators)
    while wanted:
        name = wanted.pop()
        if name in found:
            continue
        function = ir.serde.deserialize_function(FUNCTIONS[name].to_function_proto())
        _shorten(function)
        found[name] = function
        wanted += [node.op_type for node in function if node.domain == DOMAIN]
    return [found[name] for name in sorted(found)]


def _shorten(function: ir.Function) -> None:
    """Drop names that onnxscript has made up: the bodies are in every file."""
    for node in function:
        node.name = None
        for value in node.outputs:
            if value.name is not None and value.name.startswith("tmp"):
                value.name = value.name.replace("tmp_", "t")
