"""Sums, products, means and functions of single numbers."""

from __future__ import annotations

import math
from typing import Final

import torch
from torch import fx

from normfuse.graph import ops, query
from normfuse.integer.lowering import Lowering, largest_code, unsupported
from normfuse.integer.products import product
from normfuse.integer.roles import MEANS, viewed
from normfuse.integer.written import Written
from normfuse.kernels.integer_ops import INT_ADD, INT_MEAN, INT_MULTIPLY, INT_TABLE
from normfuse.kernels.reference.rescaling import codes_type
from normfuse.quant.dyadic import WIDE, dyadic, require_below

__all__ = ["add", "mean", "multiply", "table"]

SUM_BITS: Final = 40
"""The multipliers of a sum may be longer than others: a 16-bit code times them is far below 2^62."""

CODES: Final = torch.arange(-128, 128)


def add(lowering: Lowering, node: fx.Node, written: Written) -> fx.Node:
    """Write a sum; where one operand is a product of weights that nobody else reads, as its last step."""
    x, y = node.args[:2]
    sign = -1.0 if node.target is ops.SUB else 1.0
    if node.kwargs.get("alpha", 1) != 1 or not isinstance(x, fx.Node) or not isinstance(y, fx.Node):
        raise unsupported(node)
    if not lowering.is_coded(x):
        return product(lowering, x, written, lowering.coded(y), at=node)
    if not lowering.is_coded(y):
        return product(lowering, y, written, lowering.coded(x), at=node)
    first, second = lowering.coded(x), lowering.coded(y)
    ratios = torch.tensor([first.scale, sign * second.scale], dtype=torch.float64) / written.scale
    multipliers, shift = dyadic(ratios, bits=SUM_BITS)
    a, b = (int(each) for each in multipliers)
    offset = -first.zero_point * a - second.zero_point * b
    largest = largest_code(first.node) * abs(a) + largest_code(second.node) * abs(b) + abs(offset)
    require_below(largest, WIDE, what="a sum before it is rescaled", where=lowering.layer(node))
    return lowering.edit.call(
        INT_ADD, first.node, second.node, a, b, offset, shift, *written.ends(), at=node, after=True
    )


def multiply(lowering: Lowering, node: fx.Node, written: Written) -> fx.Node:
    """Write the elementwise product of two activations."""
    if not all(isinstance(each, fx.Node) for each in node.args[:2]):
        raise unsupported(node)
    x, y = (lowering.coded(query.operand(node, index)) for index in (0, 1))
    multiplier, shift = dyadic(torch.tensor(x.scale * y.scale / written.scale, dtype=torch.float64), bits=30)
    largest = math.prod(largest_code(each.node) + abs(each.zero_point) for each in (x, y)) * int(multiplier)
    require_below(largest, WIDE, what="a product before it is rescaled", where=lowering.layer(node))
    return lowering.edit.call(
        INT_MULTIPLY,
        *(x.node, y.node, x.zero_point, y.zero_point, int(multiplier), shift),
        *written.ends(),
        at=node,
        after=True,
    )


def mean(lowering: Lowering, node: fx.Node, written: Written) -> fx.Node:
    """Write a mean over axes of fixed sizes, global average pooling among them."""
    x = lowering.coded(viewed(node))
    axes, keeps = _axes(node)
    sizes = [query.shape(viewed(node))[axis] for axis in axes]
    if not all(isinstance(size, int) for size in sizes):
        raise unsupported(node)
    count = math.prod(int(size) for size in sizes)
    multiplier, shift = dyadic(torch.tensor(x.scale / count / written.scale, dtype=torch.float64))
    largest = (largest_code(x.node) + abs(x.zero_point)) * count * int(multiplier)
    require_below(largest, WIDE, what="a sum before it is rescaled", where=lowering.layer(node))
    return lowering.edit.call(
        INT_MEAN,
        *(x.node, axes, keeps, -x.zero_point * count, int(multiplier), shift),
        *written.ends(),
        at=node,
        after=True,
    )


def _axes(node: fx.Node) -> tuple[list[int], bool]:
    if query.is_call(node, ops.MEAN):
        axes = query.argument(node, 1, "dim") or range(query.rank(viewed(node)))
        return [int(axis) for axis in axes], bool(query.argument(node, 2, "keepdim", False))
    if any(size != 1 for size in node.args[1]):  # type: ignore[union-attr]
        raise unsupported(node)
    return [*range(-MEANS[node.target], 0)], True


def table(lowering: Lowering, node: fx.Node, written: Written) -> fx.Node:
    """Write a function of one number as its 256 values."""
    x = lowering.operand(viewed(node))
    values = (CODES - x.zero_point).double() * x.scale
    found = node.target(values, *node.args[1:], **node.kwargs)  # type: ignore[operator]
    kind = codes_type(written.minimum, written.maximum)
    entries = lowering.edit.constant(written.codes_of(found).to(kind), f"{node.name}_table", like=node)
    return lowering.edit.call(INT_TABLE, x.node, entries, at=node, after=True, name=f"{node.name}_codes")
