"""Linear maps (linear and convolution) with constant weights, read and given new weights the same way."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, fx

from normfuse.graph import Graph, ops, query
from normfuse.graph.edit import Editor

__all__ = ["LinearMap", "read_linear_map", "rebind"]


@dataclass(frozen=True, slots=True)
class LinearMap:
    """``W x + b``: weight [out, in / groups, ...], bias [out] or None, and the channel axes of x and y."""

    weight: Tensor
    bias: Tensor | None
    input_axis: int
    output_axis: int
    groups: int
    pads_with_zeros: bool


def read_linear_map(graph: Graph, node: fx.Node) -> LinearMap | None:
    """Return the map that ``node`` computes, or None if it is none or its weights are not constant."""
    if not query.is_call(node, ops.LINEAR, *ops.CONVOLUTIONS):
        return None
    weight, bias = node.args[1], query.argument(node, 2, "bias")
    if not query.is_constant(weight) or not (bias is None or query.is_constant(bias)):
        return None
    data = query.constant(graph, weight)  # type: ignore[arg-type]
    bias_data = None if bias is None else query.constant(graph, bias)
    if node.target is ops.LINEAR:
        last = query.rank(node) - 1
        return LinearMap(data, bias_data, last, last, 1, False)
    padding = query.argument(node, 4, "padding", 0)
    spatial = ops.CONVOLUTIONS[node.target]
    batched = query.rank(node) == spatial + 2
    axis = 1 if batched else 0
    return LinearMap(data, bias_data, axis, axis, int(query.argument(node, 6, "groups", 1)), _pads(padding))


def _pads(padding: object) -> bool:
    if isinstance(padding, str):
        return padding != "valid"
    return any(padding) if isinstance(padding, (list, tuple)) else bool(padding)


def rebind(edit: Editor, node: fx.Node, weight: Tensor, bias: Tensor) -> None:
    """Give a linear or convolution node new constants; the old tensors are left as they are."""
    owner = str(node.args[1].target).rpartition(".")[0]  # type: ignore[union-attr]
    prefix = f"{owner}." if owner else ""
    edit.set_constant(node, 1, weight, f"{prefix}weight")
    if "bias" in node.kwargs:
        node.kwargs = {key: value for key, value in node.kwargs.items() if key != "bias"}
    edit.set_constant(node, 2, bias, f"{prefix}bias")
