"""Samples joined to chunks, and which of these teach and which judge what was learned."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

import torch
from torch import Tensor

from normfuse.graph import Graph

__all__ = ["Split", "chunk_size", "chunked", "samples_in", "split"]

LARGEST: Final = 16
"""Samples that are computed at once."""


Numbered = tuple[int, Sequence[Tensor]]


@dataclass(frozen=True, slots=True)
class Split:
    """The places of the chunks that teach and of those that judge; the same ones where there is but one chunk."""

    teaching: list[int]
    judging: list[int]


def chunk_size(graph: Graph) -> int:
    """Return how many samples may be joined: one where the graph fixes its batch."""
    return LARGEST if graph.has_dynamic_batch else 1


def chunked(
    samples: Iterable[Sequence[Tensor]], size: int, *, numbers: list[list[int]] | None = None
) -> list[tuple[Tensor, ...]]:
    """Return single samples joined along their first axis to chunks of one shape, ``size`` of them at most.

    As many as there are of a shape are shared out evenly. To ``numbers`` those of every chunk's samples are added, so
    that the chunks need no name where they are handed on.
    """
    groups = dict[tuple[torch.Size, ...], list[Numbered]]()
    for number, sample in enumerate(samples):
        groups.setdefault(tuple(tensor.shape for tensor in sample), []).append((number, sample))
    chunks = [part for group in groups.values() for part in _shared_out(group, size)]
    if numbers is not None:
        numbers += [[number for number, _ in chunk] for chunk in chunks]
    return [_joined([sample for _, sample in chunk]) for chunk in chunks]


def _shared_out(group: list[Numbered], size: int) -> list[list[Numbered]]:
    """Return the group in as few parts of at most ``size`` as there must be, of sizes that differ by one at most."""
    count = -(-len(group) // size)
    ends = [len(group) * part // count for part in range(count + 1)]
    return [group[start:end] for start, end in pairwise(ends)]


def _joined(group: list[Sequence[Tensor]]) -> tuple[Tensor, ...]:
    return tuple(torch.cat(tensors) if tensors[0].ndim else tensors[0] for tensors in zip(*group, strict=True))


def samples_in(chunk: Sequence[Tensor]) -> int:
    """Return how many samples were joined."""
    return max((len(tensor) for tensor in chunk if tensor.ndim), default=1)


def split(sizes: Sequence[int], share: int) -> Split:
    """Return which chunks teach and which judge: of ``share`` samples at least one.

    Those that judge are taken from all over the list, from its end on, since chunks of one shape are neighbours.

    Args:
        sizes: the samples of every chunk.
        share: how many samples one of them judges for.
    """
    last, judging = len(sizes) - 1, list[int]()
    for at in (at for first in range(share) for at in range(last - first, -1, -share)):
        if len(judging) < last and sum(sizes[each] for each in judging) * share < sum(sizes):
            judging.append(at)
    teaching = [at for at in range(len(sizes)) if at not in judging]
    return Split(teaching, sorted(judging) or teaching)
