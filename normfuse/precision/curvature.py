"""How much an error at a block's exits counts for the network's outputs, element by element."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor, fx

from normfuse.graph import query
from normfuse.graph.segments import Compute, run_segment
from normfuse.precision.block import Block, summed_error, tensors_of
from normfuse.precision.decision import Quantization
from normfuse.precision.simulation import Simulation, in_float

__all__ = ["exit_weights"]

FLOOR: Final = 0.1
"""Of the mean weight: no element is free, as its weight is an estimate from few samples."""


def exit_weights(block: Block, decided: Quantization) -> list[Tensor]:
    """Return a weight for every element of the block's exits, of mean 1, float32, size 1 on axes of free sizes.

    Axes of free sizes (the batch, the length of a text) share their weights, as do all elements where the outputs do
    not depend on the block.

    The outputs' error L has no gradient at the float exits z, and ``g = H (z_q - z)`` behind quantization. Least
    squares over the samples gives the diagonal ``h_i = sum g_i d_i / sum d_i^2`` for ``d = z_q - z``, one gradient per
    chunk. Negative ones become 0, and all get a floor (ours).

    Source: "LS-ViT: Least-Squares Hessian Based Block Reconstruction" (CVPR 2026), whose rank-one part is left out.
    """
    simulation = Simulation(decided)
    exits = [node for node in block.segment.exits if query.is_float(node)]
    free = [[axis for axis, size in enumerate(query.shape(node)) if not isinstance(size, int)] for node in exits]
    seen = list[list[tuple[Tensor, Tensor]]]()
    for chunk in block.split.teaching:
        parts = zip(*_gradients(block, chunk, exits, simulation), free, strict=True)
        seen.append([(_summed(g * d, axes), _summed(d.square(), axes)) for g, d, axes in parts])
    return [_weights(sums) for sums in zip(*seen, strict=True)]


def _gradients(
    block: Block, chunk: int, exits: Sequence[fx.Node], simulation: Compute
) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """Return the gradient of the outputs' error at the exits, and what these err by."""
    values = dict(block.entries[chunk])
    with torch.no_grad():
        run_segment(block.graph, block.segment, values, simulation)
    for node in exits:
        values[node] = values[node].detach().requires_grad_()
    found = [values[node] for node in exits]
    differences = [now.detach() - then for now, then in zip(found, block.target(chunk), strict=True)]
    with torch.enable_grad():
        run_segment(block.graph, block.rest, values, in_float)
        loss = summed_error(tensors_of(block.graph.outputs, values), block.answers[chunk])
        if not loss.requires_grad:
            return [torch.zeros_like(each) for each in found], differences
        return torch.autograd.grad(loss, found, materialize_grads=True), differences


def _summed(x: Tensor, axes: list[int]) -> Tensor:
    """Return the sum over these axes, in float64; they stay with size 1."""
    return x.double().sum(dim=axes, keepdim=True) if axes else x.double()


def _weights(sums: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Return the weights of one exit from every chunk's sums of ``g d`` and ``d^2``."""
    product, square = (torch.stack(parts).sum(dim=0) for parts in zip(*sums, strict=True))
    curvature = (product / square.clamp(min=torch.finfo(torch.float64).tiny)).clamp(min=0)
    mean = curvature.mean()
    return ((curvature / mean + FLOOR) / (1 + FLOOR)).float() if mean > 0 else torch.ones(())
