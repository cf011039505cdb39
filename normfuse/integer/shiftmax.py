"""Attention whose softmax is Shiftmax: its scores are codes, and so are its probabilities."""

from __future__ import annotations

import math
from typing import Final

import torch
from torch import fx

from normfuse.graph import ops, query
from normfuse.integer.lowering import Lowering
from normfuse.integer.octaves import octaves
from normfuse.integer.products import product_of_codes
from normfuse.integer.roles import viewed
from normfuse.integer.written import Coded, Written
from normfuse.kernels.integer_ops import SHIFTMAX

__all__ = ["shiftmax_attention"]

OCTAVES: Final = 15
"""n, as published."""

PROBABILITY: Final = 127
"""The largest probability, at a scale of 1/128: what is multiplied with values has 8 bits."""


def shiftmax_attention(
    lowering: Lowering, node: fx.Node, written: Written, scores: Coded, bias: fx.Node | None
) -> fx.Node:
    """Write ``shiftmax(scores + bias)`` and its product with values ("I-ViT", Li and Gu, 2022, arXiv 2207.01405).

    Args:
        lowering: the graph and its constants.
        node: the float product of probabilities and values.
        written: the codes that are wanted of it.
        scores: int8 [..., queries, keys], zero point 0.
        bias: int32 at the scale of the scores, broadcast against them; None for nothing.

    Raises:
        UnsupportedModel: scores are so small that the sum of a row's exponentials would be cut.
    """
    softmax, values, codes = viewed(node), lowering.operand(query.operand(node, 1)), scores.node
    size = query.shape(softmax)[-1]
    keys = size if isinstance(size, int) else 1  # how many there will be is not known
    if bias is not None:
        wide = lowering.edit.call(ops.ATEN._to_copy.default, codes, dtype=torch.int32, at=node)
        codes = lowering.edit.call(ops.ADD, wide, bias, at=node)
    x0 = math.floor(-1 / scores.scale)
    n = octaves(x0, keys, published=OCTAVES, where=lowering.layer(node))
    weights = lowering.edit.call(
        SHIFTMAX, codes, x0, n, PROBABILITY, at=node, like=softmax, name=f"{softmax.name}_codes"
    )
    probabilities = Coded(weights, 1 / (PROBABILITY + 1), 0)
    return product_of_codes(lowering, node, (probabilities, values), written)
