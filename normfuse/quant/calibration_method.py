"""How the ranges of activations are chosen: by one method for all, or by a competition."""

from __future__ import annotations

from enum import Enum

__all__ = ["CalibrationMethod"]


class CalibrationMethod(Enum):
    """The value is what recipes and the command line write."""

    AUTO = "auto"
    MIN_MAX = "min-max"
    PERCENTILE = "percentile"
    MSE = "mse"
    ENTROPY = "entropy"
