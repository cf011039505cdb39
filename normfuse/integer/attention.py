"""Attention: scores, softmax and the weighted sum as one operator."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from torch import fx

from normfuse.errors import UnsupportedModel
from normfuse.graph import ops, query
from normfuse.integer.lowering import Lowering, unsupported
from normfuse.integer.products import matmul
from normfuse.integer.roles import is_given, is_masked, is_view, viewed
from normfuse.integer.shiftmax import shiftmax_attention
from normfuse.integer.written import Coded, Written
from normfuse.kernels.integer_ops import INT_ATTENTION
from normfuse.kernels.reference.attention import FRACTION, RECIPROCAL
from normfuse.quant.dyadic import ACCUMULATOR, LARGEST_SHIFT, WIDE, dyadic, require_below

__all__ = ["attention", "whole_attention"]

SCORE_BITS: Final = 30

MASKED: Final = 1 << 30
"""What is taken off a masked score; 2^30 steps are many octaves at any scale that scores have."""

PART: Final = MASKED >> 2
"""The largest part of a bias: the sum of four is still within what is added to scores, and one masks. Of more parts
each is smaller."""

FADED: Final = 16
"""Octaves that a mask has to take off a score; from nine on nothing is left of its weight."""

WEIGHT: Final = 255
"""The largest weight."""

VALUE: Final = 128
"""The largest magnitude of a value's code."""

LARGEST_CODE: Final = 127
"""The largest magnitude of a code of q or k."""


def attention(lowering: Lowering, node: fx.Node, written: Written) -> fx.Node:
    """Write ``softmax(q k + bias) v`` that is spelled out, or a plain product where ``node`` is none of attention.

    Where scores have codes, softmax is a step of its own.
    """
    weights, values = query.operand(node, 0), query.operand(node, 1)
    if lowering.is_coded(weights):
        return matmul(lowering, node, written)
    scores, bias = viewed(weights), None
    added = None
    if is_masked(scores):
        mask, scores = (query.operand(scores, index) for index in (0, 1))
        added = _masked(lowering, node, mask)
    elif query.is_call(scores, ops.ADD):
        operands = [query.operand(scores, index) for index in (0, 1)]
        bias, scores = sorted(operands, key=lambda each: not is_given(each))
    if lowering.is_coded(scores):
        found = lowering.coded(scores)
        added = added if bias is None else _bias(lowering, bias, found.scale)
        return shiftmax_attention(lowering, node, written, found, added)
    q, k, v = (lowering.operand(each) for each in (query.operand(scores, 0), query.operand(scores, 1), values))
    added = added if bias is None else _bias(lowering, bias, q.scale * k.scale)
    return _written(lowering, node, _Heads(q, k, v, added, 1.0), written)


def whole_attention(lowering: Lowering, node: fx.Node, written: Written) -> fx.Node:
    """Write ``scaled_dot_product_attention``, which is whole where its mask comes with every sample.

    Raises:
        UnsupportedModel: its mask is causal, or float and no constant, or heads of values are shared.
    """
    q, k, v = (lowering.operand(query.operand(node, index)) for index in range(3))
    mask = query.argument(node, 3, "attn_mask")
    is_plain = not query.argument(node, 5, "is_causal", False) and not node.kwargs.get("enable_gqa", False)
    is_known = mask is None or query.dtype(mask) is torch.bool or is_given(mask)
    if not is_plain or not is_known:
        raise unsupported(node)
    rank = query.rank(k.node)
    turned = lowering.edit.call(ops.PERMUTE, k.node, [*range(rank - 2), rank - 1, rank - 2], at=node)
    scale = query.argument(node, 6, "scale")
    inner = query.shape(query.operand(node, 0))[-1]
    if scale is None and not isinstance(inner, int):
        raise unsupported(node)
    ratio = float(scale) if scale is not None else int(inner) ** -0.5
    if mask is None:
        added = None
    elif query.dtype(mask) is torch.bool:
        added = _masked(lowering, node, mask)
    else:
        added = _bias(lowering, mask, q.scale * k.scale * ratio)
    return _written(lowering, node, _Heads(q, replace(k, node=turned), v, added, ratio), written)


@dataclass(frozen=True, slots=True)
class _Heads:
    """What a group of heads reads: k is turned, [..., channels, keys]; ``scale`` is what scores are multiplied with."""

    q: Coded
    k: Coded
    v: Coded
    bias: fx.Node | None
    scale: float


def _written(lowering: Lowering, node: fx.Node, heads: _Heads, written: Written) -> fx.Node:
    unit = heads.q.scale * heads.k.scale * heads.scale
    octaves = torch.tensor(unit * math.log2(math.e) * (1 << FRACTION), dtype=torch.float64)
    score_multiplier, score_shift = dyadic(octaves, bits=SCORE_BITS)
    multiplier, shift = dyadic(
        torch.tensor(heads.v.scale / written.scale, dtype=torch.float64), largest_shift=LARGEST_SHIFT - RECIPROCAL
    )
    where, inner, keys = lowering.layer(node), query.shape(heads.q.node)[-1], query.shape(heads.v.node)[-2]
    if not isinstance(inner, int) or inner * LARGEST_CODE**2 >= MASKED:
        raise UnsupportedModel(
            f"scores sum up {inner} products", where=where, expected=f"a fixed number up to {MASKED // LARGEST_CODE**2}"
        )
    if isinstance(keys, int):
        require_below(float(keys) * WEIGHT * VALUE, ACCUMULATOR, what="a sum of values", where=where)
    # Values weigh 128 at most, whatever the number of keys: a row's multiplier is divided by the sum of its weights.
    largest = float(VALUE * int(multiplier) * 2**RECIPROCAL)
    require_below(largest, WIDE, what="a weighted sum before it is rescaled", where=where)
    return lowering.edit.call(
        INT_ATTENTION,
        *(heads.q.node, heads.k.node, heads.v.node, heads.bias),
        *(int(score_multiplier), score_shift, int(multiplier), shift + RECIPROCAL),
        *written.ends(),
        at=node,
        after=True,
        name=f"{node.name}_codes",
    )


def _bias(lowering: Lowering, bias: fx.Node, unit: float) -> fx.Node:
    """Return a bias that is given at the scale of the scores, its parts in the same form as they were."""
    return _part(lowering, bias, unit, min(PART, MASKED // _parts(bias)))


def _parts(bias: fx.Node) -> int:
    """Return how many constants a bias is the sum of."""
    if query.is_constant(bias):
        return 1
    if is_view(bias):
        return _parts(viewed(bias))
    return sum(_parts(query.operand(bias, index)) for index in (0, 1))


def _part(lowering: Lowering, bias: fx.Node, unit: float, most: int) -> fx.Node:
    if query.is_constant(bias):
        values = query.constant(lowering.graph, bias).double() / unit
        if bool((values.abs() > most).any()) and most * unit * math.log2(math.e) < FADED:
            raise UnsupportedModel(
                f"a bias of scores up to {float(values.abs().max()):.3g} steps of theirs",
                where=lowering.layer(bias),
                expected=f"at most {most}, or scores whose steps are larger than {unit:.3g}",
                hint="--allow-float-islands leaves this attention in float",
            )
        codes = torch.floor(values.clamp(-most, most) + 0.5)
        return lowering.constant(codes, f"{bias.name}_codes", bias)
    if is_view(bias):
        source = _part(lowering, viewed(bias), unit, most)
        return lowering.edit.call(bias.target, source, *bias.args[1:], at=bias, **dict[str, Any](bias.kwargs))
    parts = [_part(lowering, query.operand(bias, index), unit, most) for index in (0, 1)]
    return lowering.edit.call(ops.ADD, *parts, at=bias)


def _masked(lowering: Lowering, node: fx.Node, mask: fx.Node) -> fx.Node:
    """Return what is added to scores: 0 where a boolean mask is true, elsewhere what leaves nothing of them."""
    much = lowering.constant(torch.tensor(MASKED), f"{node.name}_masked", node)
    seen = lowering.edit.call(ops.ATEN._to_copy.default, mask, dtype=torch.int32, at=node)
    kept = lowering.edit.call(ops.MUL, seen, much, at=node)
    return lowering.edit.call(ops.SUB, kept, much, at=node)
