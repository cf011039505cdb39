"""Attention: scores, softmax and the weighted sum as one operator."""

from __future__ import annotations

import math
from typing import Final

import torch
from torch import fx

from normfuse.errors import UnsupportedModel
from normfuse.graph import ops, query
from normfuse.integer.lowering import Lowering
from normfuse.integer.products import matmul
from normfuse.integer.roles import viewed
from normfuse.integer.written import Written
from normfuse.kernels.integer_ops import INT_ATTENTION
from normfuse.kernels.reference.attention import FRACTION, RECIPROCAL
from normfuse.quant.dyadic import ACCUMULATOR, WIDE, dyadic, require_below

__all__ = ["attention"]

SCORE_BITS: Final = 30

MASKED: Final = 1 << 30
"""What is taken off a masked score; 2^30 steps are many octaves at any scale that scores have."""

WEIGHT: Final = 255
VALUE: Final = 128


def attention(lowering: Lowering, node: fx.Node, written: Written) -> fx.Node:
    """Write ``softmax(q k + bias) v``, or a plain product where ``node`` is none of attention."""
    weights, values = query.operand(node, 0), query.operand(node, 1)
    if lowering.is_coded(weights):
        return matmul(lowering, node, written)
    scores, bias = viewed(weights), None
    if query.is_call(scores, ops.ADD):
        operands = [query.operand(scores, index) for index in (0, 1)]
        bias, scores = sorted(operands, key=lambda each: not query.is_constant(each))
    q, k, v = (lowering.coded(each) for each in (query.operand(scores, 0), query.operand(scores, 1), values))
    unit, keys = q.scale * k.scale, query.shape(values)[-2]
    octaves = torch.tensor(unit * math.log2(math.e) * (1 << FRACTION), dtype=torch.float64)
    score_multiplier, score_shift = dyadic(octaves, bits=SCORE_BITS)
    multiplier, shift = dyadic(torch.tensor(v.scale / written.scale, dtype=torch.float64))
    where = lowering.layer(node)
    inner = query.shape(viewed(scores))[-1]
    if not isinstance(inner, int) or inner * 127**2 >= MASKED:
        raise UnsupportedModel(f"scores sum up {inner} products", where=where, expected="a fixed number below 66,000")
    if isinstance(keys, int):
        require_below(float(keys) * WEIGHT * VALUE, ACCUMULATOR, what="a sum of values", where=where)
    # Values weigh 128 at most, whatever the number of keys: a row's multiplier is divided by the sum of its weights.
    largest = float(VALUE * int(multiplier) * 2**RECIPROCAL)
    require_below(largest, WIDE, what="a weighted sum before it is rescaled", where=where)
    added = None if bias is None else _bias(lowering, bias, unit)
    return lowering.edit.call(
        INT_ATTENTION,
        *(q.node, k.node, v.node, added, int(score_multiplier), score_shift, int(multiplier), shift + RECIPROCAL),
        *written.ends(),
        at=node,
        after=True,
        name=f"{node.name}_codes",
    )


def _bias(lowering: Lowering, bias: fx.Node, unit: float) -> fx.Node:
    values = query.constant(lowering.graph, bias).double() / unit
    codes = torch.floor(values.clamp(-MASKED, MASKED) + 0.5)
    return lowering.constant(codes, f"{bias.name}_codes", bias)
