"""Codes of activations whose scales are found while the engine runs: one per row and group of neighbours.

This is what onnxruntime's MatMulNBits does on the CPU with ``accuracy_level`` 4, found by experiment (onnxruntime
1.31.1, x86 with VNNI; reading the codes out through a weight of ones on the diagonal, with inputs on the borders
between codes):

    largest = max |x| over the group            inverse = 127 / largest, rounded to x's type
    code    = round_half_to_even(x * inverse)   real    = code * (largest / 127)

No code of 2.3 million differed, half of them on a border; with ``x / (largest / 127)`` 8 to 10 % of all do, with its
reciprocal as the inverse 4 to 8 %.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Final

import torch
from torch import Tensor

from normfuse.errors import UsageError
from normfuse.quant.integer_type import INT8_NARROW, IntegerType

__all__ = ["ROUNDED_LEVEL", "DynamicParams", "round_rows"]

ROUNDED_LEVEL: Final = 4
"""MatMulNBits' ``accuracy_level`` where it moves its input to codes of 8 bits, as ``round_rows`` does."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DynamicParams:
    """Symmetric codes with one scale for every ``size`` neighbours on the last axis, found while the engine runs.

    Attributes:
        size: neighbours that share a scale; it divides the extent of the last axis.
        sum_scale: where biases are held as integers, what one step of a sum stands for, over the weight's scale; None:
            they are added in float.
        type: the range of the codes, the only one that the kernel makes.

    Raises:
        UsageError: groups hold nothing.
    """

    type: ClassVar[IntegerType] = INT8_NARROW

    size: int
    sum_scale: float | None = None

    def __post_init__(self) -> None:
        if self.size < 1:
            raise UsageError(f"dynamic codes by groups of {self.size}", expected="1 or more")


def round_rows(x: Tensor, params: DynamicParams) -> Tensor:
    """Return ``x`` moved to the nearest value that has a code, in x's shape and type.

    A group whose inverse is infinite (its largest magnitude is below 4e-37) becomes zeros, as it does in the engine.

    Args:
        x: any float type, [..., inputs].
        params: the groups; their size divides the inputs.

    Raises:
        UsageError: it does not.
    """
    if x.ndim == 0 or x.shape[-1] % params.size:
        raise UsageError(f"groups of {params.size} in rows of {list(x.shape)}", expected="a size that divides a row")
    groups = x.reshape(*x.shape[:-1], -1, params.size)
    largest = groups.abs().amax(dim=-1, keepdim=True)
    # A tensor in front: a number divided by a tensor is multiplied with the tensor's reciprocal, which rounds twice.
    inverse = largest.new_tensor(params.type.maximum) / largest
    values = torch.round(groups * inverse) * (largest / params.type.maximum)
    return torch.where(inverse.isfinite(), values, 0.0).reshape(x.shape)
