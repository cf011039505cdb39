"""Other codes for what the products of attention read: one scale per head, probabilities on a logarithmic scale.

Both are for simulation (see ``Placement.head_scales`` and ``Placement.logarithmic_softmax``).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

import torch
from torch import Tensor, fx

from normfuse.graph import ops, query
from normfuse.graph.quantization import is_requested
from normfuse.precision.block import Block
from normfuse.precision.decision import Quantization
from normfuse.precision.simulation import Simulation, params_of_request, source_of_request
from normfuse.quant import (
    DynamicParams,
    PerChannel,
    PerGroup,
    PerTensor,
    QuantParams,
    WeightClip,
    logarithmic_params,
    weight_params,
)
from normfuse.quant.integer_type import IntegerType

__all__ = ["scale_heads", "take_logarithms"]

HEADS: Final = -3
"""The axis of the heads in an operand [..., heads, rows, columns]."""

MATRICES: Final = 4
"""The least rank of an operand that has heads beside its batch."""


def scale_heads(block: Block, decided: Quantization) -> Quantization:
    """Return the decision with one uniform scale per head, of least squared error, for every operand of a product."""
    for node in _operands(block):
        params = params_of_request(node, decided)
        if isinstance(params, QuantParams) and (heads := _heads(node)) is not None:
            values = _values(block, node, decided, heads)
            found = weight_params(values, 0, params.type, clip=WeightClip.MSE, is_symmetric=False)
            decided = decided.changed(activations={source_of_request(node): replace(found, granularity=heads)})
    return decided


def take_logarithms(block: Block, decided: Quantization, *, per_octave: int) -> Quantization:
    """Return the decision with logarithmic codes for probabilities, one scale per head where they have such scales.

    Args:
        block: what is to compute better with them.
        decided: so far.
        per_octave: how many codes halve a value: 1 is log2, 2 is log sqrt 2.
    """
    for node in _operands(block):
        params, source = params_of_request(node, decided), node.args[0]
        if params is None or isinstance(params, DynamicParams):
            continue
        if not isinstance(params.type, IntegerType) or params.type.signed:
            continue
        if query.is_call(source, ops.SOFTMAX):
            scales = params.granularity
            assert not isinstance(scales, PerGroup)
            values = _values(block, node, decided, scales)
            among = PerChannel(0) if isinstance(scales, PerChannel) else scales
            found = logarithmic_params(values, params.type, per_octave=per_octave, granularity=among)
            decided = decided.changed(activations={source_of_request(node): replace(found, granularity=scales)})
    return decided


def _operands(block: Block) -> list[fx.Node]:
    """Return the requests of the block that products of two activations alone read."""
    return [
        node
        for node in block.segment.nodes
        if is_requested(node) and all(query.is_call(reader, ops.MATMUL) for reader in query.readers(node))
    ]


def _heads(node: fx.Node) -> PerChannel | None:
    """Return the axis of the heads, None where there is none or their number is not known."""
    shape = query.shape(node)
    if len(shape) < MATRICES or not isinstance(shape[HEADS], int):
        return None
    return PerChannel(len(shape) + HEADS)


def _values(block: Block, node: fx.Node, decided: Quantization, on: PerTensor | PerChannel) -> Tensor:
    """Return what a request is given behind what was decided, on all chunks that teach, whose lengths may differ.

    [channels, values] with a scale per channel, else [1, values].
    """
    simulation, axis = Simulation(decided), on.axis if isinstance(on, PerChannel) else None
    with torch.no_grad():
        found = (block.inputs_of(node, chunk, simulation, is_exact=False) for chunk in block.split.teaching)
        rows = [x.reshape(1, -1) if axis is None else x.movedim(axis, 0).flatten(1) for x in found]
    return torch.cat(rows, dim=1)
