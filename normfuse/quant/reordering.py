"""Symmetric matrices with their rows and columns in another order."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

__all__ = ["reordered"]

SLICE: Final = 256
"""Rows gathered at once: the matrix itself is all that is made."""


def reordered(gram: Tensor, order: Tensor | None) -> Tensor:
    """Return ``gram[order][:, order]`` of every group as a new tensor, stored column by column.

    Args:
        gram: [groups, K, K], any strides.
        order: [groups, K]; None for the order that it has.
    """
    found = torch.empty_like(gram.mT, memory_format=torch.contiguous_format).mT
    for matrix, source, rows in zip(found, gram, order if order is not None else [None] * len(gram), strict=True):
        for start in range(0, matrix.shape[0], SLICE):
            part = slice(start, start + SLICE)
            matrix[part] = source[part] if rows is None else source[rows[part, None], rows]
    return found
