"""Linear maps (linear, convolution, transposed convolution) with constant weights, and their folds."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor, fx

from normfuse.graph import Graph, ops, query
from normfuse.graph.affine import Affine
from normfuse.graph.edit import Editor

__all__ = ["LINEAR_MAPS", "LinearMap", "read_linear_map", "rebind"]

LINEAR_MAPS = (ops.LINEAR, *ops.CONVOLUTIONS, *ops.TRANSPOSED_CONVOLUTIONS)


@dataclass(frozen=True, slots=True)
class LinearMap:
    """``W x + b``: its constants, the channel axes of x and y, and where it reads zeros that x does not hold.

    ``weight`` is [out, in / groups, ...], for a transposed convolution [in, out / groups, ...]; ``bias`` [out] or
    None.
    """

    weight: Tensor
    bias: Tensor | None
    input_axis: int
    output_axis: int
    groups: int = 1
    pads_with_zeros: bool = False
    is_transposed: bool = False

    @property
    def inputs(self) -> int:
        """The number of input channels."""
        return self.weight.shape[0] if self.is_transposed else self.weight.shape[1] * self.groups

    @property
    def outputs(self) -> int:
        """The number of output channels."""
        return self.weight.shape[1] * self.groups if self.is_transposed else self.weight.shape[0]

    @property
    def is_finite(self) -> bool:
        """Whether every constant is a number (float16 ends at 65504)."""
        return bool(self.weight.isfinite().all() and (self.bias is None or self.bias.isfinite().all()))

    def behind(self, found: Affine) -> LinearMap:
        """Return the map ``found(W x + b)``: W' = diag(a) W, b' = a b + c. Exact for any padding and groups.

        Computed in float64 and rounded once, to the type of ``weight``.
        """
        scale, shift = found.scale.expand(self.outputs), found.shift.expand(self.outputs)
        grouped = self._grouped()
        rows = grouped * scale.reshape(self.groups, -1, 1, 1)
        bias = shift if self.bias is None else scale * self.bias.double() + shift
        return replace(self, weight=self._ungrouped(rows), bias=bias.to(self.weight.dtype))

    def before(self, found: Affine) -> LinearMap:
        """Return ``W' x + b' == W found(x) + b``: W' = W diag(a), b' = b + W c.

        For a convolution b' holds where the receptive field lies inside x; a transposed convolution keeps b, its
        shift is another one at every position.
        """
        scale, shift = found.scale.expand(self.inputs), found.shift.expand(self.inputs)
        grouped = self._grouped()
        scaled = grouped * scale.reshape(self.groups, 1, -1, 1)
        offset = (grouped * shift.reshape(self.groups, 1, -1, 1)).sum(dim=(2, 3)).reshape(-1)
        bias = None if self.bias is None else self.bias.double()
        if not self.is_transposed:
            bias = offset if bias is None else offset + bias
        return replace(self, weight=self._ungrouped(scaled), bias=None if bias is None else bias.to(self.weight.dtype))

    def _grouped(self) -> Tensor:
        """Return the weight in float64 as [groups, out / groups, in / groups, taps]."""
        wide = self.weight.double()
        if self.is_transposed:
            split = wide.reshape(self.groups, self.inputs // self.groups, self.outputs // self.groups, -1)
            return split.transpose(1, 2)
        return wide.reshape(self.groups, self.outputs // self.groups, self.inputs // self.groups, -1)

    def _ungrouped(self, grouped: Tensor) -> Tensor:
        ordered = grouped.transpose(1, 2) if self.is_transposed else grouped
        return ordered.reshape(self.weight.shape).to(self.weight.dtype)


def read_linear_map(graph: Graph, node: fx.Node) -> LinearMap | None:
    """Return the map that ``node`` computes, or None if it is none or its weight is not constant or a vector."""
    if not query.is_call(node, *LINEAR_MAPS):
        return None
    weight, bias = node.args[1], query.argument(node, 2, "bias")
    if not query.is_constant(weight) or not (bias is None or query.is_constant(bias)):
        return None
    data = query.constant(graph, weight)  # type: ignore[arg-type]
    if data.ndim < 2:  # a product with one vector has no output axis
        return None
    bias_data = None if bias is None else query.constant(graph, bias)
    if node.target is ops.LINEAR:
        last = query.rank(node) - 1
        return LinearMap(data, bias_data, last, last)
    is_transposed = node.target in ops.TRANSPOSED_CONVOLUTIONS
    axis = query.rank(node) - (data.ndim - 2) - 1  # 1 with a batch axis, 0 without
    return LinearMap(
        data,
        bias_data,
        axis,
        axis,
        groups=int(query.argument(node, 6, "groups", 1)),
        pads_with_zeros=not is_transposed and _pads(query.argument(node, 4, "padding", 0)),
        is_transposed=is_transposed,
    )


def _pads(padding: object) -> bool:
    return any(padding) if isinstance(padding, (list, tuple)) else bool(padding)


def rebind(edit: Editor, node: fx.Node, new: LinearMap) -> None:
    """Give a linear map's node new constants; the old tensors are left as they are."""
    owner = str(node.args[1].target).rpartition(".")[0]  # type: ignore[union-attr]
    prefix = f"{owner}." if owner else ""
    edit.set_constant(node, 1, new.weight, f"{prefix}weight")
    if new.bias is not None:
        edit.set_constant(node, 2, new.bias, f"{prefix}bias")
