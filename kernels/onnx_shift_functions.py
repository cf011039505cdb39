"""The shift operators as ONNX functions; see ``normfuse.kernels.onnx_functions``, and for what they compute
``normfuse.kernels.reference.shift_exponential``.

ONNX divides toward zero and shifts unsigned integers only, so what is rounded down is made positive by 2^62 first.
"""

from __future__ import annotations

from typing import Final

from onnxscript import script

from normfuse.kernels.onnx_domain import INT64, UINT64, UP, normfuse, op

__all__ = ["SHIFT_FUNCTIONS"]


@script(normfuse, default_opset=op)
def floor_divided(x, divisor: int):
    """Return int64 x / divisor rounded down, for a power of two."""
    up, by = op.Constant(value_int=UP), op.Constant(value_int=divisor)
    return op.Sub(op.Div(op.Add(x, up), by), op.Div(up, by))


@script(normfuse, default_opset=op)
def shift_exponential(x, x0: int, n: int):
    """Return e^(x s) |x0| 2^n."""
    unit = op.Neg(op.Constant(value_int=x0))
    highest = op.Constant(value_int=32)
    octaves = op.Sub(op.Add(x, normfuse.floor_divided(x, divisor=2)), normfuse.floor_divided(x, divisor=16))
    top = op.Mul(op.Sub(highest, op.Constant(value_int=n)), unit)
    positive = normfuse.larger(op.Sub(top, octaves), op.Constant(value_int=0))
    below = normfuse.smaller(positive, op.Mul(highest, unit))
    whole = op.Div(below, unit)
    rest = op.Sub(below, op.Mul(whole, unit))
    chord = op.Cast(op.Sub(op.Add(unit, unit), rest), to=UINT64)
    doubled = op.BitShift(chord, op.Cast(op.Sub(highest, whole), to=UINT64), direction="LEFT")
    return op.Cast(op.BitShift(doubled, op.Cast(op.Constant(value_int=1), to=UINT64), direction="RIGHT"), to=INT64)


@script(normfuse, default_opset=op)
def cut_reciprocal(x):
    """Return (2^31 - 1) / min(x, 2^31 - 1) rounded down."""
    largest = op.Constant(value_int=2147483647)
    return op.Div(largest, normfuse.smaller(x, largest))


@script(normfuse, default_opset=op)
def shiftmax(scores, x0: int, n: int, maximum: int, to: int):
    """Return a softmax over the last axis."""
    below = op.Sub(op.Cast(scores, to=INT64), normfuse.largest_of_row(scores))
    weights = normfuse.shift_exponential(below, x0=x0, n=n)
    factor = normfuse.cut_reciprocal(op.ReduceSum(weights, op.Constant(value_ints=[-1]), keepdims=1))
    largest = op.Constant(value_int=maximum)
    steps = op.Add(largest, op.Constant(value_int=1))
    shares = op.Div(op.Mul(weights, factor), op.Div(op.Constant(value_int=2147483648), steps))
    return op.Cast(normfuse.smaller(shares, largest), to=to)


@script(normfuse, default_opset=op)
def shift_gelu(x, x0: int, n: int, multiplier: int, shift: int, zero_point: int, minimum: int, maximum: int, to: int):
    """Return codes of x sigmoid(1.702 x), as published."""
    wide = op.Cast(x, to=INT64)
    largest = normfuse.largest_of_row(x)
    own = normfuse.shift_exponential(op.Sub(wide, largest), x0=x0, n=n)
    other = normfuse.shift_exponential(op.Neg(largest), x0=x0, n=n)
    factor = normfuse.cut_reciprocal(op.Add(own, other))
    gate = op.Div(op.Mul(own, factor), op.Constant(value_int=16777216))
    return normfuse.rescale(
        op.Mul(wide, gate),
        op.Constant(value_int=0),
        op.Constant(value_int=multiplier),
        shift=shift,
        zero_point=zero_point,
        minimum=minimum,
        maximum=maximum,
        to=to,
    )


@script(normfuse, default_opset=op)
def lambda_shift_gelu(
    x, x0: int, bound: int, multiplier: int, shift: int, zero_point: int, minimum: int, maximum: int, to: int
):
    """Return codes of x sigmoid(1.702 x), of x above the bound and of 0 below minus the bound."""
    wide, none, steps = op.Cast(x, to=INT64), op.Constant(value_int=0), op.Constant(value_int=65536)
    one = op.Mul(op.Neg(op.Constant(value_int=x0)), steps)
    finer = op.Mul(op.Abs(wide), op.Constant(value_int=64))
    other = normfuse.shift_exponential(op.Neg(finer), x0=x0, n=16)
    total = op.Add(one, other)
    share = op.Mul(op.Where(op.Greater(wide, none), one, other), steps)
    gate = op.Div(op.Add(share, op.Div(total, op.Constant(value_int=2))), total)
    highest = op.Constant(value_int=bound)
    without_low = op.Where(op.Less(wide, op.Neg(highest)), none, gate)
    return normfuse.rescale(
        op.Mul(wide, op.Where(op.Greater(wide, highest), steps, without_low)),
        none,
        op.Constant(value_int=multiplier),
        shift=shift,
        zero_point=zero_point,
        minimum=minimum,
        maximum=maximum,
        to=to,
    )


SHIFT_FUNCTIONS: Final = (
    floor_divided,
    shift_exponential,
    cut_reciprocal,
    shiftmax,
    shift_gelu,
    lambda_shift_gelu,
)
"""The operators, and the parts that they share."""
