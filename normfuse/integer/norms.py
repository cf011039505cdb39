"""Layer and RMS norm on the 16-bit stream."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor, fx

from normfuse.errors import UnsupportedModel
from normfuse.graph import ops, query
from normfuse.integer.lowering import Lowering, per_channel, shared
from normfuse.integer.roles import viewed
from normfuse.integer.written import Coded, Written
from normfuse.kernels.integer_ops import INT_LAYER_NORM, INT_RMS_NORM, INT_TOKEN_CODES, INT_TOKEN_FACTORS
from normfuse.kernels.reference.norms import FRACTION
from normfuse.quant.dyadic import WIDE, require_below

__all__ = ["norm"]

MOST_CHANNELS: Final = 1 << 14
"""Channels times a 16-bit code times a 31-bit reciprocal stay below 2^62."""

LARGEST: Final = 1 << 15


def norm(lowering: Lowering, node: fx.Node, written: Written) -> fx.Node:
    """Write a norm over the last axis; gamma, beta and an affine behind it are part of its last step.

    Of codes per token it is no step: what it makes are the codes of its input, and factors.

    Raises:
        UnsupportedModel: it is over more than the last axis, or over more than 16,384 channels.
    """
    x, shape = lowering.coded(viewed(node)), node.args[1]
    where = lowering.layer(node)
    count = shape[0] if isinstance(shape, (list, tuple)) and len(shape) == 1 else None
    if not isinstance(count, int) or count > MOST_CHANNELS:
        raise UnsupportedModel(
            f"a norm over {shape}", where=where, expected=f"one axis of at most {MOST_CHANNELS} channels"
        )
    gamma, beta, eps = _constants(lowering, node, count)
    epsilon = max(1, round(eps * (count / x.scale) ** 2))
    require_below(float(count**2 * LARGEST**2 + epsilon), WIDE, what="a sum of squares", where=where)
    if written.is_by_token:
        return _by_token(lowering, node, x, epsilon)
    affine = written.affine
    gain = affine.scale * gamma / written.scale * 2.0**-FRACTION
    multiplier, bias, shift = per_channel(gain, (affine.scale * beta + affine.shift) / written.scale)
    largest = (count**0.5 * 2.0**FRACTION + float(bias.abs().max())) * float(multiplier.abs().max())
    require_below(largest, WIDE, what="a normalized value before it is rescaled", where=where)
    constants = [
        lowering.constant(shared(vector), f"{node.name}_{name}", node)
        for vector, name in ((bias, "bias"), (multiplier, "multiplier"))
    ]
    operator = INT_LAYER_NORM if node.target is ops.LAYER_NORM else INT_RMS_NORM
    return lowering.edit.call(
        operator, x.node, *constants, epsilon, shift, *written.ends(), at=node, after=True, name=f"{node.name}_codes"
    )


def _by_token(lowering: Lowering, node: fx.Node, x: Coded, epsilon: int) -> fx.Node:
    """Write the codes of tokens, and beside them the factors that are left of the norm."""
    is_centred = node.target is ops.LAYER_NORM
    codes = lowering.edit.call(INT_TOKEN_CODES, x.node, is_centred, at=node, after=True, name=f"{node.name}_codes")
    lowering.factors[codes] = lowering.edit.call(
        INT_TOKEN_FACTORS, x.node, epsilon, is_centred, at=node, after=True, name=f"{node.name}_factors"
    )
    return codes


def _constants(lowering: Lowering, node: fx.Node, count: int) -> tuple[Tensor, Tensor, float]:
    """Return gamma, beta and eps."""
    is_layer_norm = node.target is ops.LAYER_NORM
    eps = query.argument(node, 4 if is_layer_norm else 3, "eps", 1e-5)
    given = [query.argument(node, 2, "weight"), query.argument(node, 3, "bias") if is_layer_norm else None]
    gamma, beta = (None if each is None else query.constant(lowering.graph, each).double() for each in given)
    return (
        torch.ones(count, dtype=torch.float64) if gamma is None else gamma,
        torch.zeros(count, dtype=torch.float64) if beta is None else beta,
        torch.finfo(torch.float32).eps if eps is None else float(eps),
    )
