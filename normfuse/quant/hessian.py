"""What the inputs of a linear map say about its weights: second moments, summed over batches in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from normfuse.errors import BadInput, UsageError
from normfuse.quant.input_means import SLICE, InputMeans

__all__ = ["InputMoments"]


class InputMoments(InputMeans):
    """Sums of the inputs' products, for each group of a linear map with ``K`` inputs per output.

    ``X_q`` are the inputs as the quantized layer will see them, ``X_f`` those of the float model, row by row for the
    same samples. Products of float32 values are exact in float64 and their sums keep 53 bits, so that neither the order
    of the samples nor their batches or workers show in the choices made from them.

    Attributes:
        count: how many rows were seen.
        gram: ``X_q^T X_q``, float64 [groups, K, K], half the Hessian of the squared error of an output.
        drift: ``X_q^T (X_f - X_q)``, float64 [groups, K, K]; None as long as both were the same. As a difference it
            keeps its digits where the two are close.
        total: the sum of ``X_q``, float64 [groups, K].
        total_drift: the sum of ``X_f - X_q``, float64 [groups, K].
        square_drift: the sum of all squares of ``X_f - X_q``, float64 [groups].
    """

    __slots__ = ("drift", "gram", "square_drift")

    def __init__(self, inputs: int, *, groups: int = 1, device: torch.device | str = "cpu") -> None:
        super().__init__(inputs, groups=groups, device=device)
        self.gram = torch.zeros(groups, inputs, inputs, dtype=torch.float64, device=device)
        self.drift: Tensor | None = None
        self.square_drift = torch.zeros(groups, dtype=torch.float64, device=device)

    def update(self, x_quantized: Tensor, x_float: Tensor | None = None) -> None:
        """Add rows of inputs.

        Args:
            x_quantized: any float type, [n, K] with one group, else [groups, n, K].
            x_float: the same rows in the float model, of the same shape; None where they are the same.

        Raises:
            UsageError: a shape is another one.
            BadInput: a value is NaN or infinite; the state is then unchanged.
        """
        if x_float is not None and x_float.shape != x_quantized.shape:
            raise UsageError(
                f"inputs of the float model of shape {list(x_float.shape)}", expected=str(list(x_quantized.shape))
            )
        quantized = self._rows(x_quantized)
        exact = None if x_float is None else self._rows(x_float)
        for start in range(0, quantized.shape[1], SLICE):
            part = slice(start, start + SLICE)
            self._add(quantized[:, part].double(), None if exact is None else exact[:, part].double())

    def _add(self, rows: Tensor, exact: Tensor | None) -> None:
        """Add rows in float64, [groups, n, K] each."""
        self.count += rows.shape[1]
        self.gram.baddbmm_(rows.mT, rows)
        self.total += rows.sum(dim=1)
        if exact is not None:
            difference = exact - rows
            self.drift = torch.zeros_like(self.gram) if self.drift is None else self.drift
            self.drift.baddbmm_(rows.mT, difference)
            self.total_drift += difference.sum(dim=1)
            self.square_drift += difference.square_().sum(dim=(1, 2))

    def merge(self, other: InputMoments) -> None:
        """Add everything that ``other`` has seen; ``other`` is not changed.

        Raises:
            UsageError: it is about another number of inputs or groups.
        """
        if other.gram.shape != self.gram.shape:
            raise UsageError(
                f"moments of {list(other.gram.shape)} merged into {list(self.gram.shape)}", expected="one shape"
            )
        device = self.gram.device
        self.count += other.count
        self.gram += other.gram.to(device)
        self.total += other.total.to(device)
        self.total_drift += other.total_drift.to(device)
        self.square_drift += other.square_drift.to(device)
        if other.drift is not None:
            drift = other.drift.to(device)
            self.drift = drift.clone() if self.drift is None else self.drift + drift

    def _rows(self, x: Tensor) -> Tensor:
        """Return the rows on the state's device, checked, [groups, n, K]."""
        groups, inputs = self.total.shape
        rows = x[None] if x.ndim == 2 else x
        if rows.ndim != 3 or (rows.shape[0], rows.shape[2]) != (groups, inputs):
            raise UsageError(f"inputs of shape {list(x.shape)}", expected=f"[{groups}, rows, {inputs}]")
        rows = rows.detach().to(self.gram.device)
        if not bool(rows.isfinite().all()):
            raise BadInput("an input of a linear map holds NaN or infinity", expected="finite values")
        return rows
