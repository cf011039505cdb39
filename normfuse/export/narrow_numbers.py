"""What the types of floats that are narrower than float32 hold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import ml_dtypes
import numpy as np
import onnx_ir as ir

from normfuse.quant.target import BodyType

__all__ = ["NUMBERS", "Numbers"]


@dataclass(frozen=True, slots=True)
class Numbers:
    """A type of floats in ONNX and in numpy."""

    onnx: ir.DataType
    numpy: np.dtype[Any]

    @property
    def _limits(self) -> Any:
        return ml_dtypes.finfo(self.numpy)  # type: ignore[no-untyped-call]

    @property
    def largest(self) -> float:
        """The largest finite number."""
        return float(self._limits.max)

    @property
    def largest_counted(self) -> float:
        """The largest number up to which it holds every whole one."""
        return 2.0 ** (int(self._limits.nmant) + 1)

    @property
    def smallest(self) -> float:
        """The smallest normal number."""
        return float(self._limits.smallest_normal)

    @property
    def smallest_scale(self) -> float:
        """The smallest number that is rounded by a thousandth at most; with few exponents it is not a normal one."""
        return max(float(self._limits.smallest_subnormal) * 512, 2.0**-126)

    def unfit(self, constant: Any) -> str:
        """Return what of a constant the type does not hold: a finite number, or anything but zeros; empty: nothing."""
        sizes = np.abs(constant[np.isfinite(constant)].astype(np.float64))
        if sizes.size and sizes.max() > self.largest:
            return f"a constant of {sizes.max():.3g}"
        if sizes.any() and sizes.max() < self.smallest:
            return f"a constant of {sizes.max():.3g}"
        return ""

    def unfit_scale(self, scale: Any) -> str:
        """Return which of the scales of codes the type does not hold; empty: none."""
        unfit = [each for each in (scale.min(), scale.max()) if not self.smallest_scale <= each <= self.largest]
        return f"a scale of {unfit[0]:.3g}" if unfit else ""


NUMBERS: Final = {
    BodyType.FP16: Numbers(ir.DataType.FLOAT16, np.dtype(np.float16)),
    BodyType.BF16: Numbers(ir.DataType.BFLOAT16, np.dtype(ml_dtypes.bfloat16)),
}
