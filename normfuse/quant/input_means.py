"""The means of a linear map's inputs, summed over batches in float64."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from normfuse.errors import UsageError

__all__ = ["SLICE", "InputMeans"]

SLICE: Final = 1024
"""Rows held in float64 at once: those of a batch of images would take more than all weights of their layer."""


class InputMeans:
    """What ``InputMoments`` says of the means alone, to the bit, without a matrix.

    Attributes:
        count: how many rows were seen.
        total: the sum of ``X_q``, float64 [groups, K].
        total_drift: the sum of ``X_f - X_q``, float64 [groups, K].
    """

    __slots__ = ("count", "total", "total_drift")

    def __init__(self, inputs: int, *, groups: int = 1, device: torch.device | str = "cpu") -> None:
        self.count = 0
        self.total = torch.zeros(groups, inputs, dtype=torch.float64, device=device)
        self.total_drift = torch.zeros_like(self.total)

    def update(self, x_quantized: Tensor, x_float: Tensor) -> None:
        """Add rows of inputs, of any float type, [n, K] with one group, else [groups, n, K].

        Raises:
            UsageError: the shapes differ, or are others.
        """
        groups, inputs = self.total.shape
        shape = x_quantized.shape if x_quantized.ndim == 3 else (1, *x_quantized.shape)
        if x_float.shape != x_quantized.shape or (shape[0], shape[2]) != (groups, inputs):
            raise UsageError(
                f"inputs of shapes {list(x_quantized.shape)} and {list(x_float.shape)}",
                expected=f"[{groups}, rows, {inputs}] twice",
            )
        pairs = (
            torch.split(x.detach().to(self.total.device).reshape(shape), SLICE, dim=1) for x in (x_quantized, x_float)
        )
        for quantized, exact in zip(*pairs, strict=True):
            rows = quantized.double()
            self.count += rows.shape[1]
            self.total += rows.sum(dim=1)
            self.total_drift += (exact.double() - rows).sum(dim=1)

    @property
    def mean_quantized(self) -> Tensor:
        """The mean of ``X_q``, float64 [groups, K]; zeros of nothing."""
        return self.total / max(self.count, 1)

    @property
    def mean_float(self) -> Tensor:
        """The mean of ``X_f``, float64 [groups, K]; zeros of nothing."""
        return (self.total + self.total_drift) / max(self.count, 1)
