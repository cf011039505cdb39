"""The squared error that a change of one tensor leaves at the outputs of what reads it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, Final

import torch
from torch import Tensor, fx

from normfuse.graph import Graph, ops
from normfuse.graph.quickly import linear as linear_map
from normfuse.rewrite.linear_map import LinearMap, read_linear_map

__all__ = ["OutputError"]

SKETCHED: Final = 64
"""Output channels that are left of a wider map."""

SEED: Final = 0

SLICE: Final = 1 << 14
"""Squares summed in float32 before their sums are in float64."""

SMALLEST: Final = 2.0**-1022
"""The smallest normal float64, divided by in place of 0."""


class OutputError:
    """Sums ``||A d||^2`` over the maps ``A`` that read a tensor (without their biases), ``||d||^2`` over other readers.

    Unless ``is_exact``, a map of more than ``SKETCHED`` outputs is sketched: for orthonormal random ``S``,
    [m, outputs], times ``sqrt(outputs / m)``, ``||S A d||^2`` has the mean ``||A d||^2`` (Johnson and Lindenstrauss
    1984). The columns of ``S A`` get the lengths of those of ``A``, so that errors of single channels are exact, and
    errors that are independent of each other nearly so. A common direction of all errors, such as the lobe of a GELU
    that few bits round to zero, can be misjudged by a tenth. Grouped and transposed convolutions are not sketched.

    Linear maps that read the same tensor are one map with the outputs of all. (Ours.)
    """

    def __init__(self, graph: Graph, readers: Sequence[fx.Node], *, is_exact: bool) -> None:
        found = [(reader, read_linear_map(graph, reader)) for reader in readers]
        linear = [each.weight for reader, each in found if each is not None and reader.target is ops.LINEAR]
        self._maps: list[Callable[[Tensor], Tensor]] = []
        if linear:
            weight = _sketched(torch.cat(linear), is_exact)
            self._maps.append(lambda d: linear_map(d, weight))
        for reader, each in found:
            if each is not None and reader.target is not ops.LINEAR:
                self._maps.append(_convolution(reader, each, is_exact))
        self._others = sum(each is None for _, each in found)

    def __call__(self, difference: Tensor) -> float:
        """Return the error that ``difference``, of the tensor's shape, leaves."""
        error = self._others * _squares(difference) if self._others else 0.0
        return error + sum(_squares(each(difference)) for each in self._maps)


def _convolution(reader: fx.Node, found: LinearMap, is_exact: bool) -> Callable[[Tensor], Tensor]:
    operator: Any = reader.target
    options = {key: value for key, value in reader.kwargs.items() if key != "bias"}
    weight = _sketched(found.weight, is_exact or found.is_transposed or found.groups > 1)
    return lambda difference: operator(difference, weight, None, *reader.args[3:], **options)


def _sketched(weight: Tensor, is_exact: bool) -> Tensor:
    """Return ``sqrt(outputs / m) S weight``, [m, ...], of a weight [outputs, ...]."""
    outputs = weight.shape[0]
    if is_exact or outputs <= SKETCHED:
        return weight
    columns = weight.detach().flatten(1).cpu().double()
    rows = _sketch(outputs) @ columns
    rows *= columns.norm(dim=0) / rows.norm(dim=0).clamp(min=SMALLEST)
    return rows.to(weight).reshape(SKETCHED, *weight.shape[1:])


@cache
def _sketch(outputs: int) -> Tensor:
    generator = torch.Generator().manual_seed(SEED)
    basis, _ = torch.linalg.qr(torch.randn(outputs, SKETCHED, generator=generator, dtype=torch.float64))
    sketch: Tensor = (outputs / SKETCHED) ** 0.5 * basis.mT
    return sketch


def _squares(x: Tensor) -> float:
    flat = x.reshape(-1)
    # In slices: a sum of few float32 products keeps its digits, and nothing is widened as a whole.
    return sum(float(torch.dot(part, part)) for part in torch.split(flat, SLICE))
