"""The norm by token as ONNX functions; see ``normfuse.kernels.onnx_functions``, and for what they compute
``normfuse.kernels.reference.tokens``.
"""

from __future__ import annotations

from typing import Final

from onnxscript import script

from normfuse.kernels.onnx_domain import INT8, INT32, INT64, normfuse, op

__all__ = ["TOKEN_FUNCTIONS"]


@script(normfuse, default_opset=op)
def token_total(x, is_centred: int):
    """Return the sum of every token, or 0, for int64 x."""
    return op.Mul(op.ReduceSum(x, op.Constant(value_ints=[-1]), keepdims=1), op.Constant(value_int=is_centred))


@script(normfuse, default_opset=op)
def token_deviations(x, is_centred: int):
    """Return channels times x, less every token's sum if it is centred, for int64 x; below 2^31."""
    return op.Sub(op.Mul(op.Shape(x, start=-1), x), normfuse.token_total(x, is_centred=is_centred))


@script(normfuse, default_opset=op)
def int_token_codes(x, is_centred: int):
    """Return codes of every token at a scale of its own."""
    deviations = normfuse.token_deviations(op.Cast(x, to=INT64), is_centred=is_centred)
    one, last = op.Constant(value_int=1), op.Constant(value_int=127)
    largest = normfuse.larger(normfuse.largest_of_row(op.Abs(deviations)), one)
    twice = op.Add(largest, largest)
    # ONNX divides toward zero, so 127 is added first.
    positive = op.Add(op.Mul(twice, last), op.Add(op.Mul(op.Add(deviations, deviations), last), largest))
    return op.Cast(op.Sub(op.Div(positive, twice), last), to=INT8)


@script(normfuse, default_opset=op)
def int_token_factors(x, epsilon: int, is_centred: int):
    """Return what 127 stands for in every token of its norm."""
    last = op.Constant(value_ints=[-1])
    wide = op.Cast(x, to=INT64)
    total = normfuse.token_total(wide, is_centred=is_centred)
    squares = op.Mul(op.Shape(wide, start=-1), op.ReduceSum(op.Mul(wide, wide), last, keepdims=1))
    power = op.Add(op.Sub(squares, op.Mul(total, total)), op.Constant(value_int=epsilon))
    largest = normfuse.largest_of_row(op.Abs(normfuse.token_deviations(wide, is_centred=is_centred)))
    return op.Cast(normfuse.over_root(largest, power), to=INT32)


@script(normfuse, default_opset=op)
def int_linear_tokens(
    x,
    factors,
    weight,
    bias,
    multiplier,
    token_shift: int,
    shift: int,
    zero_point: int,
    minimum: int,
    maximum: int,
    to: int,
):
    """Return codes of norm(x) W^T + b."""
    sums = op.Cast(normfuse.product(x, op.Transpose(weight, perm=[1, 0])), to=INT64)
    scaled = normfuse.rounded_shift(op.Mul(sums, op.Cast(factors, to=INT64)), shift=token_shift)
    return normfuse.rescale(
        scaled, bias, multiplier, shift=shift, zero_point=zero_point, minimum=minimum, maximum=maximum, to=to
    )


@script(normfuse, default_opset=op)
def int_linear_tokens_table(x, factors, weight, bias, multiplier, table, token_shift: int, shift: int, zero_point: int):
    """Return a function of norm(x) W^T + b, by its table."""
    codes = normfuse.int_linear_tokens(
        x,
        factors,
        weight,
        bias,
        multiplier,
        token_shift=token_shift,
        shift=shift,
        zero_point=zero_point,
        minimum=-128,
        maximum=127,
        to=INT8,
    )
    return normfuse.int_table(codes, table)


TOKEN_FUNCTIONS: Final = (
    *(token_total, token_deviations, int_token_codes, int_token_factors),
    *(int_linear_tokens, int_linear_tokens_table),
)
"""In the order of their use."""
