"""How much is tried to keep the accuracy: seconds, minutes, tens of minutes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from enum import IntEnum
from functools import partial

import torch
from torch import Tensor

from normfuse.precision.attention_codes import scale_heads, take_logarithms
from normfuse.precision.blockwise import Refinement
from normfuse.precision.error_feedback import ErrorFeedback, correct_biases, feed_back_errors
from normfuse.precision.reconstruction import Reconstruction, reconstruct
from normfuse.quant.bits import MOST, Bits
from normfuse.quant.placement import Placement

__all__ = ["Effort", "chunked", "foresight", "refinements"]


class Effort(IntEnum):
    """The value is what recipes and the command line write."""

    NEAREST = 0  # every weight to its nearest code
    CLOSED_FORM = 1  # below eight bits: second-order error feedback, bias correction
    LEARNED = 2  # and weights and steps learned block by block


def refinements(bits: Bits, effort: Effort, *, seed: int, placement: Placement | None = None) -> dict[str, Refinement]:
    """Return what is tried on every block, by name, in order; codes that few targets have only where the placement is.

    At eight bits rounding to nearest is near the float network already, so only ``LEARNED`` tries anything there.
    """
    found: dict[str, Refinement] = {}
    is_low = bits.weight < MOST or bits.activation < MOST
    if effort is Effort.LEARNED or (effort is Effort.CLOSED_FORM and is_low):
        found |= _other_codes(placement)
        found["error feedback"] = partial(feed_back_errors, chosen=ErrorFeedback())
        found["bias correction"] = correct_biases
    if effort is Effort.LEARNED:
        found["reconstruction"] = partial(reconstruct, chosen=Reconstruction(seed=seed))
    return found


def foresight(effort: Effort) -> float:
    """Return the weight of the error at the network's outputs beside that at a block's, for ``refine_blockwise``."""
    return 1.0 if effort is Effort.LEARNED else 0.0


def _other_codes(placement: Placement | None) -> dict[str, Refinement]:
    """Return what may replace one uniform scale per tensor, if the placement has it."""
    found: dict[str, Refinement] = {}
    if placement is not None and placement.head_scales:
        found["head scales"] = scale_heads
    if placement is not None and placement.logarithmic_softmax:
        found["log2 codes"] = partial(take_logarithms, per_octave=1)
        found["log sqrt 2 codes"] = partial(take_logarithms, per_octave=2)
    return found


def chunked(
    samples: Iterable[Sequence[Tensor]], size: int, *, numbers: list[list[int]] | None = None
) -> list[tuple[Tensor, ...]]:
    """Return single samples joined to chunks of at most ``size`` along their first axis, each of one shape.

    To ``numbers`` those of every chunk's samples are added, so that the chunks need no name where they are handed on.
    """
    growing, chunks = dict[tuple[torch.Size, ...], dict[int, Sequence[Tensor]]](), list[dict[int, Sequence[Tensor]]]()
    for number, sample in enumerate(samples):
        shape = tuple(tensor.shape for tensor in sample)
        group = growing.setdefault(shape, {})
        group[number] = sample
        if len(group) == size:
            chunks.append(growing.pop(shape))
    chunks += growing.values()
    if numbers is not None:
        numbers += [list(group) for group in chunks]
    return [_joined(list(group.values())) for group in chunks]


def _joined(group: Sequence[Sequence[Tensor]]) -> tuple[Tensor, ...]:
    return tuple(torch.cat(tensors) if tensors[0].ndim else tensors[0] for tensors in zip(*group, strict=True))
