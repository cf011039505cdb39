"""Layer and RMS norm as ONNX functions; see ``normfuse.kernels.onnx_functions``, and for what they compute
``normfuse.kernels.reference.norms``.
"""

from __future__ import annotations

from typing import Final

from onnxscript import script

from normfuse.kernels.onnx_domain import INT64, UINT64, UP, normfuse, op
from normfuse.kernels.reference.norms import ROOT_BITS

__all__ = ["NORM_FUNCTIONS"]

POWERS_OF_FOUR = [1 << (2 * count) for count in range(ROOT_BITS)]
LIMITS = POWERS_OF_FOUR[1:]


@script(normfuse, default_opset=op)
def nearer_root(root, x):
    """Return Newton's next guess of the root of x."""
    return op.Div(op.Add(root, op.Div(x, root)), op.Constant(value_int=2))


@script(normfuse, default_opset=op)
def over_root(x, power):
    """Return x / sqrt(power) with 20 bits behind the point.

    ``power`` is brought to 2^60 ... 2^62, where six steps from 2^31 reach the root or the integer above it.
    """
    last = op.Constant(value_ints=[-1])
    is_below = op.Cast(op.Less(power, op.Constant(value_ints=LIMITS)), to=INT64)
    doublings = op.ReduceSum(is_below, last, keepdims=1)
    rooted = op.Mul(power, op.Gather(op.Constant(value_ints=POWERS_OF_FOUR), doublings))
    first = op.Expand(op.Constant(value_int=2147483648), op.Shape(rooted))
    third = normfuse.nearer_root(normfuse.nearer_root(normfuse.nearer_root(first, rooted), rooted), rooted)
    sixth = normfuse.nearer_root(normfuse.nearer_root(normfuse.nearer_root(third, rooted), rooted), rooted)
    is_above = op.Cast(op.Greater(op.Mul(sixth, sixth), rooted), to=INT64)
    root = op.Sub(sixth, is_above)
    half_root = op.Div(root, op.Constant(value_int=2))
    reciprocal = op.Div(op.Add(op.Constant(value_int=2305843009213693952), half_root), root)
    bits = op.Sub(op.Constant(value_int=41), doublings)
    one = op.Cast(op.Constant(value_int=1), to=UINT64)
    half = op.BitShift(one, op.Cast(op.Sub(bits, op.Constant(value_int=1)), to=UINT64), direction="LEFT")
    up = op.Constant(value_int=UP)
    positive = op.Add(op.Add(op.Mul(x, reciprocal), op.Cast(half, to=INT64)), up)
    amount = op.Cast(bits, to=UINT64)
    shifted = op.BitShift(op.Cast(positive, to=UINT64), amount, direction="RIGHT")
    below = op.BitShift(op.Cast(up, to=UINT64), amount, direction="RIGHT")
    return op.Sub(op.Cast(shifted, to=INT64), op.Cast(below, to=INT64))


@script(normfuse, default_opset=op)
def int_layer_norm(x, bias, multiplier, epsilon: int, shift: int, zero_point: int, minimum: int, maximum: int, to: int):
    """Return codes of a layer norm over the last axis."""
    last = op.Constant(value_ints=[-1])
    wide = op.Cast(x, to=INT64)
    channels = op.Shape(wide, start=-1)
    total = op.ReduceSum(wide, last, keepdims=1)
    squares = op.Mul(channels, op.ReduceSum(op.Mul(wide, wide), last, keepdims=1))
    power = op.Add(op.Sub(squares, op.Mul(total, total)), op.Constant(value_int=epsilon))
    normal = normfuse.over_root(op.Sub(op.Mul(channels, wide), total), power)
    return normfuse.rescale(
        normal, bias, multiplier, shift=shift, zero_point=zero_point, minimum=minimum, maximum=maximum, to=to
    )


@script(normfuse, default_opset=op)
def int_rms_norm(x, bias, multiplier, epsilon: int, shift: int, zero_point: int, minimum: int, maximum: int, to: int):
    """Return codes of an RMS norm over the last axis."""
    last = op.Constant(value_ints=[-1])
    wide = op.Cast(x, to=INT64)
    channels = op.Shape(wide, start=-1)
    squares = op.Mul(channels, op.ReduceSum(op.Mul(wide, wide), last, keepdims=1))
    power = op.Add(squares, op.Constant(value_int=epsilon))
    normal = normfuse.over_root(op.Mul(channels, wide), power)
    return normfuse.rescale(
        normal, bias, multiplier, shift=shift, zero_point=zero_point, minimum=minimum, maximum=maximum, to=to
    )


NORM_FUNCTIONS: Final = (nearer_root, over_root, int_layer_norm, int_rms_norm)
"""In the order of their use."""
