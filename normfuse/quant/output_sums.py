"""What a linear map makes, quantized and in float: enough to fit an affine of every output."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from normfuse.errors import UsageError
from normfuse.quant.input_means import SLICE

__all__ = ["OutputSums"]

CONSTANT: Final = 1e-9
"""The share of its mean square below which the variance of an output is rounding."""


class OutputSums:
    """Sums over rows of outputs, float64 [out] each: of q, f, q^2 and q f, for q quantized and f in float."""

    __slots__ = ("count", "product", "square", "total_float", "total_quantized")

    def __init__(self, outputs: int) -> None:
        self.count = 0
        self.total_quantized, self.total_float, self.square, self.product = torch.zeros(4, outputs, dtype=torch.float64)

    def update(self, quantized: Tensor, exact: Tensor) -> None:
        """Add rows of outputs.

        Args:
            quantized: any float type, [..., out].
            exact: the same rows in the float model, of the same shape.

        Raises:
            UsageError: the shapes differ or have other outputs.
        """
        if quantized.shape != exact.shape or quantized.shape[-1:] != self.square.shape:
            raise UsageError(
                f"outputs of {list(quantized.shape)} and {list(exact.shape)}", expected=f"[..., {len(self.square)}]"
            )
        rows = (torch.split(x.detach().reshape(-1, x.shape[-1]), SLICE) for x in (quantized, exact))
        for q, f in zip(*rows, strict=True):
            self._add(q.double(), f.double())

    def _add(self, q: Tensor, f: Tensor) -> None:
        """Add rows in float64, [n, out] each."""
        self.count += len(q)
        self.total_quantized += q.sum(dim=0)
        self.total_float += f.sum(dim=0)
        self.product += (q * f).sum(dim=0)
        self.square += q.square().sum(dim=0)

    def regression(self, *, through_zero: bool) -> tuple[Tensor, Tensor]:
        """Return factor and offset of every output, float64 [out], so that ``factor q + offset`` is nearest to f.

        Where q is constant, or the factor would not be positive, it is 1.

        Args:
            through_zero: whether the offset has to be 0.
        """
        count = max(self.count, 1)
        mean_q, mean_f = self.total_quantized / count, self.total_float / count
        if through_zero:
            mean_q, mean_f = torch.zeros_like(mean_q), torch.zeros_like(mean_f)
        variance = self.square / count - mean_q.square()
        factor = (self.product / count - mean_q * mean_f) / variance
        varies = variance > CONSTANT * self.square / count
        factor = torch.where(varies & (factor > 0), factor, torch.ones_like(factor))
        return factor, mean_f - factor * mean_q
