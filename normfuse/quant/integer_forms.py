"""How integers alone compute norms, softmax and GELU; what recipes and the command line write."""

from __future__ import annotations

from enum import Enum

__all__ = ["GeluForm", "NormForm", "SoftmaxForm"]


class NormForm(Enum):
    """A norm with statistics of the current input, in front of linear maps."""

    PER_TENSOR = "per-tensor"  # its own operator, and codes with one scale, found by calibration
    PER_TOKEN = "per-token"  # codes with a scale per token, which no norm changes, and a factor per token behind them


class SoftmaxForm(Enum):
    """The softmax of attention."""

    TABLE = "table"  # ours, inside int_attention: exponentials from 256 entries
    SHIFTMAX = "shiftmax"  # published: exponentials by shifts, written between two products


class GeluForm(Enum):
    """GELU, in both of its forms (by erf and by tanh)."""

    TABLE = "table"  # ours: its 256 values
    SHIFT = "shift-gelu"  # published: a sigmoid by shifts, a whole row at a time
    LAMBDA_SHIFT = "lambda-shift-gelu"  # ours, after the published one: every number alone, and a bound
