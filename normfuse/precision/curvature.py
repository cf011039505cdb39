"""How much an error at a block's exits counts for the network's outputs, element by element."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from normfuse.graph.segments import Compute, run_segment
from normfuse.precision.block import Block, summed_error, tensors_of
from normfuse.precision.decision import Quantization
from normfuse.precision.simulation import Simulation, in_float

__all__ = ["exit_weights"]

FLOOR: Final = 0.1
"""Of the mean weight: no element is free, as its weight is an estimate from few samples."""


def exit_weights(block: Block, decided: Quantization) -> list[Tensor]:
    """Return a weight for every element of the block's exits, of mean 1, shape [1, ...] where the batch is free.

    Where samples have other shapes than others, no element is the same in all, and all count alike.

    The outputs' error L has no gradient at the float exits z, and ``g = H (z_q - z)`` behind quantization. Least
    squares over the samples gives the diagonal ``h_i = sum g_i d_i / sum d_i^2`` for ``d = z_q - z``, one gradient per
    chunk. Negative ones become 0, and all get a floor (ours).

    Source: LS-ViT, 2026, whose rank-one part is left out.
    """
    seen, simulation = list[list[tuple[Tensor, Tensor]]](), Simulation(decided)
    for chunk in block.teaching:
        gradients, differences = _gradients(block, chunk, simulation)
        pairs = zip(gradients, differences, strict=True)
        seen.append([(_summed(block, g * d), _summed(block, d.square())) for g, d in pairs])
    return [_weights(sums) for sums in zip(*seen, strict=True)]


def _gradients(block: Block, chunk: int, simulation: Compute) -> tuple[tuple[Tensor, ...], list[Tensor]]:
    """Return the gradient of the outputs' error at the floating-point exits, and what these err by."""
    values = dict(block.entries[chunk])
    with torch.no_grad():
        run_segment(block.graph, block.segment, values, simulation)
    exits = [node for node in block.segment.exits if tensors_of([node], values)]
    for node in exits:
        values[node] = values[node].requires_grad_()
    found = tensors_of(exits, values)
    with torch.enable_grad():
        run_segment(block.graph, block.rest, values, in_float)
        loss = summed_error(tensors_of(block.graph.outputs, values), block.answers[chunk])
        gradients = torch.autograd.grad(loss, found, materialize_grads=True)
    wanted = block.target(chunk)
    return gradients, [(now - then).detach() for now, then in zip(found, wanted, strict=True)]


def _summed(block: Block, x: Tensor) -> Tensor:
    """Return the sum over the samples of a chunk, in float64."""
    return x.double().sum(dim=0, keepdim=True) if block.graph.has_dynamic_batch and x.ndim else x.double()


def _weights(sums: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Return the weights of one exit from every chunk's sums of ``g d`` and ``d^2``."""
    if len({product.shape for product, _ in sums}) > 1:
        return torch.ones(())
    product, square = (torch.stack(parts).sum(dim=0) for parts in zip(*sums, strict=True))
    curvature = (product / square.clamp(min=torch.finfo(torch.float64).tiny)).clamp(min=0)
    mean = curvature.mean()
    return ((curvature / mean + FLOOR) / (1 + FLOOR)).float() if mean > 0 else torch.ones(())
