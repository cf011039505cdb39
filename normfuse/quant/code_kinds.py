"""Which kind of codes activations and weights get; what recipes and the command line write."""

from __future__ import annotations

from enum import Enum

__all__ = ["ActivationCodes", "WeightCodes"]


class ActivationCodes(Enum):
    """When the scale of an activation's codes is known."""

    STATIC = "static"  # before the engine runs, from calibration samples: one per tensor
    DYNAMIC = "dynamic"  # while it runs: one per row (token) and group of neighbours


class WeightCodes(Enum):
    """Where the codes of a weight stand for zero."""

    SYMMETRIC = "symmetric"  # at 0
    ASYMMETRIC = "asymmetric"  # at a zero point of every channel or group
