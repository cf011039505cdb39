"""Functions of one number as tables: exact for 8-bit codes, whatever the function."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["int_table"]

LOWEST = -128
"""The code that the first entry belongs to."""


def int_table(x: Tensor, table: Tensor) -> Tensor:
    """Return ``table[x + 128]`` (ours).

    Args:
        x: int8 of any shape.
        table: int8 or int16 [256], for the codes -128 ... 127.
    """
    return table[x.to(torch.int64) - LOWEST]
