"""How many scales a quantized tensor has: one, one per channel, or one per block of an axis."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from torch import Tensor

from normfuse.errors import UsageError

__all__ = ["PER_TENSOR", "Granularity", "PerChannel", "PerGroup", "PerTensor", "dividing_group"]

SMALLEST_GROUP: Final = 16
"""The fewest neighbours that get a scale: onnxruntime takes no fewer, and four bits would cost what eight do."""


@dataclass(frozen=True, slots=True)
class PerTensor:
    """One scale and one zero point for the whole tensor."""

    def fits(self, shape: Sequence[int]) -> bool:
        """Whether scales may have this shape for some tensor."""
        return len(shape) == 0

    def spread(self, parameter: Tensor, shape: Sequence[int]) -> Tensor:
        """Return scales or zero points, [], as they stand beside a tensor of ``shape``.

        Raises:
            UsageError: they do not fit the tensor.
        """
        if parameter.ndim:
            raise UsageError(f"scales of shape {list(parameter.shape)} per tensor", expected="shape []")
        return parameter


@dataclass(frozen=True, slots=True)
class PerChannel:
    """One scale and one zero point for every position of ``axis``.

    Raises:
        UsageError: the axis is counted from the end.
    """

    axis: int

    def __post_init__(self) -> None:
        _check_axis(self.axis)

    def fits(self, shape: Sequence[int]) -> bool:
        """Whether scales may have this shape for some tensor."""
        return len(shape) == 1

    def spread(self, parameter: Tensor, shape: Sequence[int]) -> Tensor:
        """Return scales or zero points, [channels], as [1, ..., channels, ..., 1] beside a tensor of ``shape``.

        Raises:
            UsageError: they do not fit the tensor.
        """
        if self.axis >= len(shape) or parameter.shape != (shape[self.axis],):
            raise UsageError(
                f"scales of {list(parameter.shape)} for channel axis {self.axis} of {list(shape)}",
                expected="one scale per channel",
            )
        return parameter.reshape([-1 if axis == self.axis else 1 for axis in range(len(shape))])


@dataclass(frozen=True, slots=True)
class PerGroup:
    """One scale and one zero point for every ``size`` neighbours on ``axis``; all other axes keep their own.

    This is the blocked quantization of ONNX opset 21: the last group may be shorter, and scales have the tensor's
    shape with ``ceil(extent / size)`` on the axis.

    Raises:
        UsageError: the axis is counted from the end, or groups hold nothing.
    """

    axis: int
    size: int

    def __post_init__(self) -> None:
        _check_axis(self.axis)
        if self.size < 1:
            raise UsageError(f"groups of {self.size}", expected="1 or more")

    def fits(self, shape: Sequence[int]) -> bool:
        """Whether scales may have this shape for some tensor."""
        return len(shape) > self.axis

    def grouped(self, shape: Sequence[int]) -> list[int]:
        """Return the shape of the scales of a tensor of ``shape``, which has the axis."""
        return [-(-extent // self.size) if axis == self.axis else extent for axis, extent in enumerate(shape)]

    def spread(self, parameter: Tensor, shape: Sequence[int]) -> Tensor:
        """Return scales or zero points, ``grouped(shape)``, repeated to ``shape``.

        Raises:
            UsageError: they do not fit the tensor.
        """
        if self.axis >= len(shape) or list(parameter.shape) != self.grouped(shape):
            raise UsageError(
                f"scales of {list(parameter.shape)} for groups of {self.size} on axis {self.axis} of {list(shape)}",
                expected="one scale per group",
            )
        return parameter.repeat_interleave(self.size, dim=self.axis).narrow(self.axis, 0, shape[self.axis])


def dividing_group(extent: int, most: int) -> int | None:
    """Return the largest power of two, ``SMALLEST_GROUP`` to ``most``, that divides ``extent``: no group is cut short.

    None where there is none.
    """
    sizes = (most >> step for step in range(most.bit_length()))
    return next((size for size in sizes if size >= SMALLEST_GROUP and extent % size == 0), None)


def _check_axis(axis: int) -> None:
    if axis < 0:
        raise UsageError(f"a channel axis of {axis}", expected="an axis counted from the front, 0 or more")


Granularity = PerTensor | PerChannel | PerGroup
PER_TENSOR: Final = PerTensor()
