"""Attention as ONNX functions; see ``normfuse.kernels.onnx_functions``, and for what they compute
``normfuse.kernels.reference.attention``.
"""

from __future__ import annotations

from typing import Final

from onnxscript import script

from normfuse.kernels.onnx_domain import INT64, UINT8, normfuse, op
from normfuse.kernels.reference.attention import EXPONENTIALS

__all__ = ["ATTENTION_FUNCTIONS"]

POWERS_OF_TWO = [1 << count for count in range(32)]
EXPONENTIAL_TABLE = list(EXPONENTIALS)


@script(normfuse, default_opset=op)
def attended(
    scores,
    v,
    score_multiplier: int,
    score_shift: int,
    multiplier: int,
    shift: int,
    zero_point: int,
    minimum: int,
    maximum: int,
    to: int,
):
    """Return codes of softmax(scores) v, for int32 scores."""
    last = op.Constant(value_ints=[-1])
    below = op.Sub(normfuse.largest_of_row(scores), op.Cast(scores, to=INT64))
    octaves = normfuse.rounded_shift(op.Mul(below, op.Constant(value_int=score_multiplier)), shift=score_shift)
    steps = op.Constant(value_int=256)
    whole = op.Div(octaves, steps)
    fraction = op.Sub(octaves, op.Mul(whole, steps))
    power = op.Gather(op.Constant(value_ints=POWERS_OF_TWO), normfuse.smaller(whole, op.Constant(value_int=31)))
    entry = op.Gather(op.Constant(value_ints=EXPONENTIAL_TABLE), fraction)
    half = op.Mul(power, op.Constant(value_int=128))
    weights = op.Div(op.Add(entry, half), op.Mul(power, steps))
    wide = op.Mul(op.Constant(value_int=multiplier), op.Constant(value_int=1048576))
    row = op.Div(wide, op.ReduceSum(weights, last, keepdims=1))
    none, middle = op.Cast(op.Constant(value_int=0), to=UINT8), op.Cast(op.Constant(value_int=128), to=UINT8)
    sums = op.MatMulInteger(op.Cast(weights, to=UINT8), normfuse.unsigned(v), none, middle)
    rounded = normfuse.rounded_shift(op.Mul(op.Cast(sums, to=INT64), row), shift=shift)
    return normfuse.saturate(rounded, zero_point=zero_point, minimum=minimum, maximum=maximum, to=to)


@script(normfuse, default_opset=op)
def int_attention(
    q,
    k,
    v,
    score_multiplier: int,
    score_shift: int,
    multiplier: int,
    shift: int,
    zero_point: int,
    minimum: int,
    maximum: int,
    to: int,
):
    """Return codes of softmax(q k) v."""
    return normfuse.attended(
        normfuse.product(q, k),
        v,
        score_multiplier=score_multiplier,
        score_shift=score_shift,
        multiplier=multiplier,
        shift=shift,
        zero_point=zero_point,
        minimum=minimum,
        maximum=maximum,
        to=to,
    )


@script(normfuse, default_opset=op)
def int_attention_bias(
    q,
    k,
    v,
    bias,
    score_multiplier: int,
    score_shift: int,
    multiplier: int,
    shift: int,
    zero_point: int,
    minimum: int,
    maximum: int,
    to: int,
):
    """Return codes of softmax(q k + bias) v."""
    return normfuse.attended(
        op.Add(normfuse.product(q, k), bias),
        v,
        score_multiplier=score_multiplier,
        score_shift=score_shift,
        multiplier=multiplier,
        shift=shift,
        zero_point=zero_point,
        minimum=minimum,
        maximum=maximum,
        to=to,
    )


ATTENTION_FUNCTIONS: Final = (attended, int_attention, int_attention_bias)
"""In the order of their use."""
