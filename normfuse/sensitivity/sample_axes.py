"""Along which axis of every tensor the samples of a batch stand, so that sums can be made sample by sample."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from math import prod
from typing import Final

import torch
from torch import Tensor, fx

from normfuse.graph import Graph, metadata, ops, query

__all__ = ["Samples", "tell_samples"]

Size = int | torch.SymInt

RESHAPES: Final = frozenset({ops.RESHAPE, ops.VIEW, ops.FLATTEN, ops.ATEN.unflatten.int, ops.ATEN._unsafe_view.default})
"""Operators that keep the order of the elements and may join the samples' axis with another one, or part it."""


@dataclass(frozen=True, slots=True)
class Samples:
    """How many samples a batch holds and where they stand.

    Attributes:
        count: n, the number of samples.
        axes: by node the axis of size ``n * k`` whose first k places are the first sample's, the next k the second's
            (Swin: k windows); no nodes where all is one sample.
    """

    count: int
    axes: Mapping[fx.Node, int]

    def sums(self, node: fx.Node, x: Tensor) -> Tensor:
        """Return the sum over every sample of a tensor laid out as the node's value is, float64 [n]."""
        if self.count == 1:
            return x.sum(dtype=torch.float64).reshape(1)
        axis = self.axes[node]
        parted = torch.unflatten(x, axis, (self.count, -1))
        others = [index for index in range(parted.ndim) if index != axis]
        found: Tensor = parted.sum(dim=others, dtype=torch.float64)
        return found

    def rows(self, node: fx.Node, x: Tensor) -> Tensor:
        """Return the elements of every sample of a tensor laid out as the node's value is, [n, elements].

        What is no sample's own (it is made of constants), and a single sample, is one row.
        """
        if node not in self.axes:
            return x.reshape(1, -1)
        return x.movedim(self.axes[node], 0).reshape(self.count, -1)

    def extremes(self, node: fx.Node, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the least and the largest element of every sample, each shaped to broadcast with ``x``."""
        least, largest = self.rows(node, x).aminmax(dim=1)
        return self.spread(node, x, least), self.spread(node, x, largest)

    def spread(self, node: fx.Node, x: Tensor, factors: Tensor) -> Tensor:
        """Return one number per sample, [n], in the type of ``x`` and shaped to broadcast with it."""
        factors = factors.to(x.dtype)
        if self.count == 1:
            return factors.reshape(())
        axis = self.axes[node]
        repeated = factors.repeat_interleave(x.shape[axis] // self.count)
        return repeated.reshape([-1 if index == axis else 1 for index in range(x.ndim)])


def tell_samples(graph: Graph, nodes: Collection[fx.Node], count: int) -> Samples | None:
    """Return where the samples stand in each of these nodes' values; None if the shapes do not tell of one of them.

    Read off symbolic shapes: the axis whose size holds the batch. Where a reshape joins it with another axis, or parts
    it, as many elements must stand before it as there were; nothing else may change its size (ours).

    Args:
        graph: a graph with a dynamic batch.
        nodes: the inputs of which ``count`` samples are run, and what is computed from them.
        count: n.
    """
    if count == 1:
        return Samples(1, {})
    symbols = {symbol for node in graph.inputs for symbol in _symbols(query.shape(node)[0])}
    axes = dict[fx.Node, int]()
    for node in (node for node in graph.nodes if node in nodes):
        found = [axis for axis, size in enumerate(_shape(node)) if _symbols(size) & symbols]
        if len(found) != 1 or not all(_keeps(node, source, found[0], axes) for source in _sources(node, axes)):
            return None
        axes[node] = found[0]
    return Samples(count, axes)


def _sources(node: fx.Node, axes: Mapping[fx.Node, int]) -> list[fx.Node]:
    return [source for source in node.all_input_nodes if source in axes]


def _keeps(node: fx.Node, source: fx.Node, axis: int, axes: Mapping[fx.Node, int]) -> bool:
    """Return whether the samples of a call stand in the order in which those of one of its arguments do."""
    before, after = _shape(source), _shape(node)
    if node.target in RESHAPES:
        return _expression(prod(before[: axes[source]])) == _expression(prod(after[:axis]))
    return _expression(before[axes[source]]) == _expression(after[axis])


def _shape(node: fx.Node) -> tuple[Size, ...]:
    """Return the shape of a node's value, of its first tensor where there are several."""
    value = metadata.value_of(node)
    return tuple((value if isinstance(value, torch.Tensor) else value[0]).shape)


def _symbols(size: Size) -> frozenset[object]:
    return frozenset(size.node.expr.free_symbols) if isinstance(size, torch.SymInt) else frozenset()


def _expression(size: Size) -> object:
    return size.node.expr if isinstance(size, torch.SymInt) else size
