"""Linear maps and convolutions: sums of 8-bit products, and the sum or function behind them, in one operator."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, fx

from normfuse.graph import ops, query
from normfuse.integer.lowering import Lowering, largest_code, per_channel, unsupported
from normfuse.integer.roles import viewed
from normfuse.integer.tokens import scaled_sums, token_shift
from normfuse.integer.written import Coded, Written
from normfuse.kernels.integer_ops import (
    INT_CONV2D,
    INT_CONV2D_ADD,
    INT_LINEAR,
    INT_LINEAR_ADD,
    INT_LINEAR_TOKENS,
    INT_MATMUL,
)
from normfuse.quant.dyadic import ACCUMULATOR, WIDE, dyadic, require_below

__all__ = ["matmul", "product", "product_of_codes"]

CODES: Final = 128
"""The largest magnitude of an 8-bit code."""

RESIDUAL_BITS: Final = 46
"""What a residual is multiplied with is shorter; a 16-bit code times it is below 2^62."""


@dataclass(frozen=True, slots=True)
class _Constants:
    bias: fx.Node
    multiplier: fx.Node
    shift: int
    residual_multiplier: int = 0


def product(
    lowering: Lowering, node: fx.Node, written: Written, residual: Coded | None = None, at: fx.Node | None = None
) -> fx.Node:
    """Write a linear map or a convolution with constant weights, plus a residual if there is one.

    Args:
        lowering: the graph and its constants.
        node: the float map.
        written: the codes that are wanted, of the map or of the sum.
        residual: codes that are added.
        at: the node behind which to write; the map by default.

    Raises:
        UnsupportedModel: a sum could overflow.
    """
    if node.name not in lowering.weights:  # an activation
        raise unsupported(node)
    x, weight, place = lowering.operand(viewed(node)), lowering.weights[node.name], at or node
    stem, codes = str(query.operand(node, 1).target), weight.codes.to(torch.int8)
    scales = weight.params.scale.double() * x.scale
    is_linear = node.target is ops.LINEAR
    undone = x.zero_point * codes.flatten(1).sum(1, dtype=torch.int64) if is_linear else torch.zeros(1)
    bias = torch.zeros(len(codes)) if weight.bias is None else weight.bias
    reach = CODES + (0 if is_linear else abs(x.zero_point))
    sums = codes.flatten(1).double().abs().sum(1) * reach
    require_below(float(sums.max()), ACCUMULATOR, what="a sum of products", where=lowering.layer(node))
    if x.factors is not None:
        sums, scales = scaled_sums(sums, codes.shape[1]), scales * 2.0 ** token_shift(codes.shape[1])
    found = _constants(lowering, node, scales, bias.double(), undone, sums, written, residual, stem)
    operands = [lowering.edit.constant(codes, f"{stem}_codes", like=node), found.bias, found.multiplier]
    options = [] if is_linear else [*_options(node), x.zero_point]
    if x.factors is not None:
        assert is_linear, "place-integers asks for codes per token in front of linear maps alone"
        assert residual is None, "and of none that is computed in one with a sum"
        operator, arguments = INT_LINEAR_TOKENS, [x.node, x.factors, *operands, token_shift(codes.shape[1])]
    elif residual is None:
        operator, arguments = (INT_LINEAR if is_linear else INT_CONV2D), [x.node, *operands, *options]
    else:
        operator = INT_LINEAR_ADD if is_linear else INT_CONV2D_ADD
        arguments = [x.node, *operands, residual.node, *options, found.residual_multiplier]
    return lowering.edit.call(
        operator, *arguments, found.shift, *written.ends(), at=place, after=True, name=f"{place.name}_codes"
    )


def _constants(  # noqa: PLR0913, PLR0917 - what the last step of a product is made of
    lowering: Lowering,
    node: fx.Node,
    scales: Tensor,
    bias: Tensor,
    undone: Tensor,
    sums: Tensor,
    written: Written,
    residual: Coded | None,
    stem: str,
) -> _Constants:
    affine, where = written.affine, lowering.layer(node)
    offset = (affine.scale * bias + affine.shift) / written.scale
    most, ratio, others = {}, 0.0, 0.0
    if residual is not None:
        ratio = residual.scale / written.scale
        offset = offset - residual.zero_point * ratio
        most = {"largest_shift": RESIDUAL_BITS - max(math.frexp(ratio)[1], 0)}
    multiplier, added, shift = per_channel(affine.scale * scales / written.scale, offset, **most)
    added = added - undone.to(torch.int64)
    residual_multiplier = math.floor(ratio * 2.0**shift + 0.5)
    if residual is not None:
        others = largest_code(residual.node) * residual_multiplier
    largest = ((sums + added.abs()) * multiplier.abs()).max()
    require_below(float(largest) + others, WIDE, what="a sum before it is rescaled", where=where)
    return _Constants(
        bias=lowering.constant(added, f"{stem}_bias", node),
        multiplier=lowering.constant(multiplier, f"{stem}_multiplier", node),
        shift=shift,
        residual_multiplier=residual_multiplier,
    )


def matmul(lowering: Lowering, node: fx.Node, written: Written) -> fx.Node:
    """Write the product of two activations."""
    x, y = (lowering.operand(query.operand(node, index)) for index in (0, 1))
    return product_of_codes(lowering, node, (x, y), written)


def product_of_codes(lowering: Lowering, node: fx.Node, operands: tuple[Coded, Coded], written: Written) -> fx.Node:
    """Write the product of these codes in the place of ``node``, a float product of the same shapes."""
    x, y = operands
    inner = query.shape(viewed(node))[-1]
    ratio = torch.tensor(x.scale * y.scale / written.scale, dtype=torch.float64)
    multiplier, shift = dyadic(ratio)
    if isinstance(inner, int):
        largest = float(inner) * CODES * CODES
        require_below(largest, ACCUMULATOR, what="a sum of products", where=lowering.layer(node))
    return lowering.edit.call(INT_MATMUL, x.node, y.node, int(multiplier), shift, *written.ends(), at=node, after=True)


def _options(node: fx.Node) -> list[Any]:
    """Return stride, padding, dilation (two numbers each) and groups."""
    found = [
        query.argument(node, index, name, default)
        for index, name, default in ((3, "stride", 1), (4, "padding", 0), (5, "dilation", 1))
    ]
    pairs = [list(each) if isinstance(each, (list, tuple)) else [each] for each in found]
    return [*(each * 2 if len(each) == 1 else each for each in pairs), int(query.argument(node, 6, "groups", 1))]
