"""How integers alone compute softmax and GELU; what recipes and the command line write."""

from __future__ import annotations

from enum import Enum

__all__ = ["GeluForm", "SoftmaxForm"]


class SoftmaxForm(Enum):
    """The softmax of attention."""

    TABLE = "table"  # ours, inside int_attention: exponentials from 256 entries
    SHIFTMAX = "shiftmax"  # published: exponentials by shifts, written between two products


class GeluForm(Enum):
    """GELU, in both of its forms (by erf and by tanh)."""

    TABLE = "table"  # ours: its 256 values
    SHIFT = "shift-gelu"  # published: a sigmoid by shifts, a whole row at a time
    LAMBDA_SHIFT = "lambda-shift-gelu"  # ours, after the published one: every number alone, and a bound
