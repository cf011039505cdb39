"""``normfuse::affine``: one per-channel ``scale * x + shift``, its constants in float64, and its algebra."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, fx

from normfuse.graph import query
from normfuse.graph.edit import Editor
from normfuse.graph.graph import Graph

__all__ = ["AFFINE", "IDENTITY", "Affine", "along", "read_affine", "write_affine"]


def along(vector: Tensor, axis: int, rank: int) -> Tensor:
    """Return ``vector`` shaped to broadcast along ``axis`` of a tensor of ``rank`` axes."""
    return vector.reshape([-1 if index == axis else 1 for index in range(rank)])


@torch.library.custom_op("normfuse::affine", mutates_args=())
def affine(x: Tensor, scale: Tensor, shift: Tensor, axis: int) -> Tensor:
    """Return ``scale * x + shift`` along ``axis`` (ours).

    ``scale`` and ``shift`` are float64 vectors of the axis' size, or of size 1 (the same for every
    channel); they are rounded once, to the type of ``x``.
    """
    wide = along(scale.to(x.dtype), axis, x.ndim)
    return x * wide + along(shift.to(x.dtype), axis, x.ndim)


@affine.register_fake
def _(x: Tensor, scale: Tensor, shift: Tensor, axis: int) -> Tensor:
    return torch.empty_like(x)


AFFINE: Final = torch.ops.normfuse.affine.default


@dataclass(frozen=True, slots=True)
class Affine:
    """``scale * x + shift`` along ``axis``; float64 vectors of the channel count, or of size 1."""

    scale: Tensor
    shift: Tensor
    axis: int

    @property
    def is_uniform(self) -> bool:
        """Whether all channels share one scale and one shift, so that the axis means nothing."""
        return self.scale.numel() == 1 and self.shift.numel() == 1

    def fits(self, dtype: torch.dtype) -> bool:
        """Return whether ``dtype`` holds both vectors: finite, and the scale as precise as its largest entry can be.

        A product of two float16 scales may overflow where the two products one after the other do not.
        """
        scale, shift = self.scale.to(dtype), self.shift.to(dtype)
        if not bool(scale.isfinite().all() and shift.isfinite().all()):
            return False
        error = (scale.double() - self.scale).abs().max()
        return bool(error <= torch.finfo(dtype).eps * self.scale.abs().max())

    def after(self, inner: Affine) -> Affine | None:
        """Return this affine of ``inner``, or None where their axes differ."""
        axis = _common_axis(inner, self)
        if axis is None:
            return None
        return Affine(self.scale * inner.scale, self.scale * inner.shift + self.shift, axis).spread()

    def plus(self, other: Affine) -> Affine | None:
        """Return the sum of two affines of the same tensor, or None where their axes differ."""
        axis = _common_axis(self, other)
        if axis is None:
            return None
        return Affine(self.scale + other.scale, self.shift + other.shift, axis).spread()

    def inverse(self) -> Affine:
        """Return the affine that undoes this one.

        Raises:
            ZeroDivisionError: a scale is zero.
        """
        if bool((self.scale == 0).any()):
            raise ZeroDivisionError("a scale of zero has no inverse")
        return Affine(self.scale.reciprocal(), -self.shift / self.scale, self.axis)

    def scaling(self) -> Affine:
        """Return the same scale without the shift."""
        return Affine(self.scale, torch.zeros_like(self.scale), self.axis)

    def spread(self) -> Affine:
        """Return the same affine with both vectors of one size."""
        size = max(self.scale.numel(), self.shift.numel())
        return Affine(self.scale.expand(size).clone(), self.shift.expand(size).clone(), self.axis)


def _common_axis(first: Affine, second: Affine) -> int | None:
    if first.is_uniform:
        return second.axis
    return first.axis if second.is_uniform or first.axis == second.axis else None


IDENTITY = Affine(torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64), 0)


def read_affine(graph: Graph, node: fx.Node) -> Affine:
    """Return the constants of a ``normfuse::affine`` node."""
    _, scale, shift, axis = node.args
    return Affine(query.constant(graph, scale), query.constant(graph, shift), int(axis))  # type: ignore[arg-type]


def write_affine(edit: Editor, at: fx.Node, source: fx.Node, found: Affine) -> None:
    """Replace ``at`` by the affine of ``source``."""
    label = query.layer_of(at) or at.name
    scale = edit.constant(found.scale.double(), f"{label}.affine_scale", like=at)
    shift = edit.constant(found.shift.double(), f"{label}.affine_shift", like=at)
    edit.replace(at, AFFINE, source, scale, shift, found.axis)
