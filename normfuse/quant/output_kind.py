"""What a network's outputs are to its users, for those who compare them."""

from __future__ import annotations

from enum import Enum

__all__ = ["OutputKind"]


class OutputKind(Enum):
    """How outputs are compared; the value is what recipes and the command line write."""

    AUTO = "auto"
    """As classes if all have the shape of class scores, else as values."""
    CLASSES = "classes"
    """By their probabilities: [batch, classes], or with height and width. What is common to all counts nothing."""
    VALUES = "values"
    """By their squared error: regression, embeddings, images."""
