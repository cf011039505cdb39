"""The least squares problem that the codes of a layer's weights solve: its outputs, not its weights, should be near."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from normfuse.errors import UsageError
from normfuse.quant.hessian import InputMoments
from normfuse.quant.parameters import QuantParams
from normfuse.quant.reordering import reordered
from normfuse.quant.rounding import to_codes, to_values

__all__ = ["RoundingProblem"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundingProblem:
    """Least ``||X_q q - X_f w||^2`` over the grid points ``q``, for every output's row ``w`` alone.

    With ``H = X_q^T X_q`` and ``D = X_q^T (X_f - X_q)``, so that ``X_q^T X_f = H + D``,

        ||X_q q - X_f w||^2 - ||X_q w - X_f w||^2 = (q - w)^T H (q - w) - 2 (q - w)^T D w

    and the inputs themselves are not needed. Rows of one group share ``H``, so outputs stand behind their group.

    Attributes:
        weight: w, float64 [groups, rows, K].
        gram: H, float64 [groups, K, K].
        pull: D w, float64 [groups, rows, K]; zeros where the inputs are the float model's.
        scale: the grid's, float64 [groups, rows, K]; expanded where a row has one, as the zero points.
        zero_point: int32 [groups, rows, K].
        minimum: the smallest code.
        maximum: the largest code.
    """

    weight: Tensor
    gram: Tensor
    pull: Tensor
    scale: Tensor
    zero_point: Tensor
    minimum: int
    maximum: int

    @classmethod
    def of(
        cls, weight: Tensor, params: QuantParams, moments: InputMoments, *, asymmetric_correction: bool = True
    ) -> RoundingProblem:
        """Return the problem of a weight [out, ...] whose other axes, in order, are what ``moments`` calls K.

        Raises:
            UsageError: the weight does not fit the moments or the parameters.
        """
        groups, inputs = moments.total.shape
        if weight.shape[0] % groups or weight.numel() != weight.shape[0] * inputs:
            raise UsageError(
                f"a weight of {list(weight.shape)} beside {groups} groups of {inputs} inputs",
                expected="as many inputs per output",
            )
        device, shape = moments.gram.device, (groups, -1, inputs)
        rows = weight.detach().to(device, torch.float64).reshape(shape)
        scale, zero_point = (
            params.granularity.spread(parameter, weight.shape).expand(weight.shape).to(device).reshape(shape)
            for parameter in (params.scale.double(), params.zero_point)
        )
        drift = moments.drift if asymmetric_correction else None
        return cls(
            weight=rows,
            gram=moments.gram,
            pull=torch.zeros_like(rows) if drift is None else rows @ drift.mT,
            scale=scale,
            zero_point=zero_point,
            minimum=params.type.minimum,
            maximum=params.type.maximum,
        )

    @property
    def curvature(self) -> Tensor:
        """The diagonal of H, [groups, K]: the inputs' squared lengths; 0 marks an input that was never seen."""
        return self.gram.diagonal(dim1=1, dim2=2)

    def ordered(self, order: Tensor) -> RoundingProblem:
        """Return the problem with its columns in ``order``, [groups, K]."""
        return replace(self.with_columns(order), gram=reordered(self.gram, order))

    def with_columns(self, order: Tensor) -> RoundingProblem:
        """Return the problem with everything but H, which is large, in ``order``."""
        along = order[:, None].expand_as(self.weight)

        def taken(rows: Tensor) -> Tensor:
            return rows if rows.stride(2) == 0 else rows.gather(2, along)

        return replace(
            self,
            weight=taken(self.weight),
            pull=taken(self.pull),
            scale=taken(self.scale),
            zero_point=taken(self.zero_point),
        )

    def codes_of(self, values: Tensor, column: int) -> Tensor:
        """Return the nearest codes of one column's values, [groups, rows]."""
        scale, zero_point = self.scale[:, :, column], self.zero_point[:, :, column]
        return to_codes(values, scale, zero_point, self.minimum, self.maximum)

    def values_of(self, codes: Tensor, column: int) -> Tensor:
        """Return what one column's codes stand for, float64 [groups, rows]."""
        return to_values(codes, self.scale[:, :, column], self.zero_point[:, :, column])

    def gradient(self, values: Tensor) -> Tensor:
        """Return half the error's gradient at q, ``H (q - w) - D w``, [groups, rows, K]."""
        return (values - self.weight) @ self.gram - self.pull
