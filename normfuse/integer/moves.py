"""What moves codes about: concatenation at one scale, upsampling by repeating the nearest."""

from __future__ import annotations

import torch
from torch import fx

from normfuse.graph import ops, query
from normfuse.graph.text import operator_name
from normfuse.integer.lowering import Lowering, unsupported
from normfuse.integer.written import Written
from normfuse.report import Reason, Refusal

__all__ = ["concatenate", "upsample"]


def concatenate(lowering: Lowering, node: fx.Node, written: Written) -> fx.Node:
    """Bring all parts to one scale and join them."""
    parts = [lowering.requantize(part, lowering.coded(part), written) for part in node.args[0]]  # type: ignore[union-attr]
    return lowering.edit.call(ops.CAT, parts, *node.args[1:], at=node, after=True, **node.kwargs)


def upsample(lowering: Lowering, node: fx.Node, written: Written) -> fx.Node:
    """Repeat the nearest code; what would have been interpolated is reported."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    is_nearest = query.is_call(node, ops.ATEN.upsample_nearest2d.vec)
    if not is_nearest:
        detail = f"{operator_name(node.target)} became the nearest neighbour"
        lowering.replaced.append(Refusal(node.name, Reason.APPROXIMATED, detail, query.layer_of(node)))
    found, sizes = lowering.coded(source).node, query.shape(node)
    for axis in (2, 3):
        before, after = query.shape(source)[axis], sizes[axis]
        if not isinstance(before, int) or not isinstance(after, int):
            raise unsupported(node)
        step = torch.arange(after) if is_nearest else torch.arange(after) + 0.5
        index = torch.floor(step * before / after).to(torch.int64)
        place = lowering.edit.constant(index, f"{node.name}_{'rows' if axis == 2 else 'columns'}", like=node)
        found = lowering.edit.call(ops.INDEX_SELECT, found, axis, place, at=node)
    return found
