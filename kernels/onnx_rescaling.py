"""The steps that all ONNX functions share: ``normfuse.kernels.reference.rescaling`` in standard integer operators.

onnxruntime (1.31.1, x86-64) gets Min, Max and ReduceMax of int64 wrong where numbers of one high half differ in bit 31;
comparisons are right, and so is everything on int32. Its ReduceSum of int64 is
exact below 2^53 only, which no sum reaches.
"""

from __future__ import annotations

from typing import Final

from onnxscript import script

from normfuse.kernels.onnx_domain import INT32, INT64, UINT64, UP, normfuse, op

__all__ = ["RESCALING"]


@script(normfuse, default_opset=op)
def smaller(x, y):
    """Return the smaller one of int64 x and y."""
    return op.Where(op.Less(x, y), x, y)


@script(normfuse, default_opset=op)
def larger(x, y):
    """Return the larger one of int64 x and y."""
    return op.Where(op.Less(x, y), y, x)


@script(normfuse, default_opset=op)
def largest_of_row(x):
    """Return the largest of the last axis, for int32 x or narrower, as int64."""
    return op.Cast(op.ReduceMax(op.Cast(x, to=INT32), op.Constant(value_ints=[-1]), keepdims=1), to=INT64)


@script(normfuse, default_opset=op)
def rounded_shift(x, shift: int):
    """Return int64 x / 2^shift, rounded to the nearest integer, halves up."""
    amount = op.Cast(op.Constant(value_int=shift), to=UINT64)
    one = op.Cast(op.Constant(value_int=1), to=UINT64)
    up = op.Constant(value_int=UP)
    power = op.BitShift(one, amount, direction="LEFT")
    half = op.Cast(op.BitShift(power, one, direction="RIGHT"), to=INT64)
    positive = op.Cast(op.Add(x, op.Add(half, up)), to=UINT64)
    shifted = op.Cast(op.BitShift(positive, amount, direction="RIGHT"), to=INT64)
    below = op.Cast(op.BitShift(op.Cast(up, to=UINT64), amount, direction="RIGHT"), to=INT64)
    return op.Sub(shifted, below)


@script(normfuse, default_opset=op)
def saturate(x, zero_point: int, minimum: int, maximum: int, to: int):
    """Return int64 x + zero_point in minimum ... maximum, of type ``to``."""
    moved = op.Add(x, op.Constant(value_int=zero_point))
    low = normfuse.larger(moved, op.Constant(value_int=minimum))
    return op.Cast(normfuse.smaller(low, op.Constant(value_int=maximum)), to=to)


@script(normfuse, default_opset=op)
def rescale(x, bias, multiplier, shift: int, zero_point: int, minimum: int, maximum: int, to: int):
    """Return ``(x + bias) * multiplier / 2^shift + zero_point`` in minimum ... maximum."""
    total = op.Add(op.Cast(x, to=INT64), op.Cast(bias, to=INT64))
    scaled = op.Mul(total, op.Cast(multiplier, to=INT64))
    rounded = normfuse.rounded_shift(scaled, shift=shift)
    return normfuse.saturate(rounded, zero_point=zero_point, minimum=minimum, maximum=maximum, to=to)


RESCALING: Final = (smaller, larger, largest_of_row, rounded_shift, saturate, rescale)
"""In the order of their use."""
