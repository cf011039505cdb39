"""How many scales a quantized tensor has: one, or one per channel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from normfuse.errors import UsageError

__all__ = ["PER_TENSOR", "Granularity", "PerChannel", "PerTensor"]


@dataclass(frozen=True, slots=True)
class PerTensor:
    """One scale and one zero point for the whole tensor."""

    @property
    def operator_axis(self) -> int:
        """The ``axis`` argument of ``torch.ops.normfuse.*``: -1 says per tensor."""
        return -1


@dataclass(frozen=True, slots=True)
class PerChannel:
    """One scale and one zero point for every position of ``axis``.

    Raises:
        UsageError: the axis is counted from the end.
    """

    axis: int

    def __post_init__(self) -> None:
        if self.axis < 0:
            raise UsageError(f"a channel axis of {self.axis}", expected="an axis counted from the front, 0 or more")

    @property
    def operator_axis(self) -> int:
        """The ``axis`` argument of ``torch.ops.normfuse.*``."""
        return self.axis


Granularity = PerTensor | PerChannel
PER_TENSOR: Final = PerTensor()
