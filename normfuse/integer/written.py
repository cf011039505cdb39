"""What codes stand for, and what is still to be done to a value before it becomes codes."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor, fx

from normfuse.graph.affine import IDENTITY, Affine
from normfuse.integer.tokens import TOKEN_SCALE
from normfuse.quant import DynamicParams, QuantParams

__all__ = ["Coded", "Written"]


@dataclass(frozen=True, slots=True)
class Coded:
    """Codes in the graph: ``value = (code - zero_point) * scale``, times the token's factor where there are factors."""

    node: fx.Node
    scale: float
    zero_point: int
    factors: fx.Node | None = None


@dataclass(frozen=True, slots=True)
class Written:
    """The codes that a value shall have, behind a scale per channel and between two bounds.

    Attributes:
        scale: what one step of the codes stands for.
        zero_point: the code of zero.
        minimum: the smallest code, as bounds leave it.
        maximum: the largest.
        affine: what is computed of the value first, along its channels.
        is_by_token: whether a step stands for ``scale`` times a factor that every token finds.
    """

    scale: float
    zero_point: int
    minimum: int
    maximum: int
    affine: Affine = IDENTITY
    is_by_token: bool = False

    @classmethod
    def of(cls, params: QuantParams | DynamicParams) -> Self:
        """Return the codes of a tensor with one scale, or with one per token."""
        if isinstance(params, DynamicParams):
            return cls(TOKEN_SCALE, 0, params.type.minimum, params.type.maximum, is_by_token=True)
        return cls(float(params.scale), int(params.zero_point), params.type.minimum, params.type.maximum)

    def clamped(self, low: float, high: float) -> Self:
        """Return the same between two bounds of the value, or fewer codes of them."""
        return replace(self, minimum=max(self.minimum, self._code(low)), maximum=min(self.maximum, self._code(high)))

    def behind(self, affine: Affine) -> Self:
        """Return the same behind an affine."""
        return replace(self, affine=affine)

    def codes_of(self, values: Tensor) -> Tensor:
        """Return the nearest codes of float64 values, halves up."""
        codes = torch.floor(values / self.scale + 0.5) + self.zero_point
        return codes.clamp(self.minimum, self.maximum).to(torch.int64)

    def ends(self) -> tuple[int, int, int]:
        """Return zero point, smallest and largest code, as operators take them."""
        return self.zero_point, self.minimum, self.maximum

    def _code(self, bound: float) -> int:
        if math.isinf(bound):
            return self.minimum if bound < 0 else self.maximum
        return min(max(math.floor(bound / self.scale + 0.5) + self.zero_point, self.minimum), self.maximum)
