"""What moves codes about: concatenation at one scale, upsampling, padding."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import fx

from normfuse.graph import ops, query
from normfuse.integer.lowering import Lowering, unsupported
from normfuse.integer.roles import is_view, padding, viewed
from normfuse.integer.written import Written
from normfuse.kernels.integer_ops import INT_INTERPOLATE
from normfuse.kernels.reference.interpolation import FRACTION

__all__ = ["concatenate", "interpolate", "pad", "repeat_nearest"]


def concatenate(lowering: Lowering, node: fx.Node, written: Written) -> fx.Node:
    """Bring all parts to one scale and join them."""
    tensors = [each for each in node.args[0] if isinstance(each, fx.Node)]  # type: ignore[union-attr]
    parts = [lowering.requantize(part, lowering.coded(part), written) for part in tensors]
    return lowering.edit.call(ops.CAT, parts, query.argument(node, 1, "dim", 0), at=node, after=True)


def repeat_nearest(lowering: Lowering, node: fx.Node, written: Written) -> fx.Node:
    """Write nearest upsampling of height and width as codes that are repeated."""
    found = lowering.coded(viewed(node)).node
    for axis, before, after, ratio in _axes(node):
        index = torch.floor(torch.arange(after) * ratio).clamp(max=before - 1).to(torch.int64)
        place = lowering.edit.constant(index, f"{node.name}_{axis}", like=node)
        found = lowering.edit.call(ops.INDEX_SELECT, found, axis, place, at=node)
    return found


def interpolate(lowering: Lowering, node: fx.Node, written: Written) -> fx.Node:
    """Write bilinear upsampling: between two neighbours along height, then along width."""
    found = lowering.coded(viewed(node)).node
    for axis, before, after, ratio in _axes(node):
        steps = torch.arange(after, dtype=torch.float64)
        if node.args[2]:  # corners are aligned
            places = steps * (before - 1) / max(after - 1, 1)
        else:
            places = ((steps + 0.5) * ratio - 0.5).clamp(min=0)
        low = torch.floor(places).to(torch.int64).clamp(max=before - 1)
        weight = torch.floor((places - low) * (1 << FRACTION) + 0.5).reshape(-1, *[1] * (query.rank(node) - 1 - axis))
        constants = [
            lowering.edit.constant(tensor, f"{node.name}_{name}_{axis}", like=node)
            for name, tensor in (("low", low), ("high", (low + 1).clamp(max=before - 1)))
        ]
        part = lowering.constant(weight, f"{node.name}_weight_{axis}", node)
        found = lowering.edit.call(INT_INTERPOLATE, found, *constants, part, axis, at=node)
    return found


def pad(lowering: Lowering, node: fx.Node, written: Written) -> fx.Node:
    """Put the code of a number around codes: of 0, or at the scale that holds the number too.

    Raises:
        UnsupportedModel: what is padded is no number.
    """
    value, source = padding(node), lowering.coded(viewed(node))
    if value is None:
        raise unsupported(node)
    found = source.node if is_view(node) else lowering.requantize(node, source, written)
    code = math.floor(value / written.scale + 0.5) + written.zero_point
    kind, sides = query.dtype(found), list(node.args[1])  # type: ignore[arg-type]
    padded = lowering.typed(found, torch.int32 if kind is torch.int16 else kind)  # onnxruntime pads no int16
    padded = lowering.edit.call(ops.PAD, padded, sides, "constant", code, at=padded, after=True, like=node)
    return lowering.typed(padded, kind)


def _axes(node: fx.Node) -> Iterator[tuple[int, int, int, float]]:
    """Yield height and width: the axis, its sizes before and after, and how far apart results are."""
    factors = query.argument(node, len(node.target._schema.arguments) - 1, "scale_factors")  # type: ignore[union-attr]
    for index, axis in enumerate((2, 3)):
        before, after = query.shape(viewed(node))[axis], query.shape(node)[axis]
        if not isinstance(before, int) or not isinstance(after, int):
            raise unsupported(node)
        yield axis, before, after, 1 / factors[index] if factors else before / after
