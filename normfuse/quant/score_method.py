"""The scores that say what fewer bits of a layer cost; ``normfuse.sensitivity.methods`` computes them."""

from __future__ import annotations

import difflib
from enum import Enum
from typing import Final

from normfuse.errors import UsageError

__all__ = ["DEFAULT_SCORE", "ScoreMethod", "scores_called"]


class ScoreMethod(Enum):
    """A score; the value is what the command line and files write."""

    CURVATURE = "curvature"
    """Rounding errors followed to the outputs by gradients (Gauss-Newton): the loss to second order."""
    DIVERGENCE = "kl"
    """One part quantized at a time: the divergence of the class probabilities, measured."""
    NOISE = "sqnr"
    """One part quantized at a time: the relative squared error of the outputs, measured."""
    GRADIENT_ERROR = "gradient-error"
    """Gradients of a quantized network times rounding errors, and a least-squares curvature."""
    RELEVANCE = "lrp"
    """The layer's share of the relevance times the power of uniform noise."""
    RELEVANCE_ERROR = "lrp-error"
    """The layer's share of the relevance times the measured relative error."""
    FISHER = "fisher"
    """The trace of the empirical Fisher information times the squared rounding error."""
    HESSIAN = "hessian"
    """The trace of the Hessian times the squared rounding error."""
    RANDOM = "random"
    """What every score must beat."""

    @property
    def needs_classes(self) -> bool:
        """Whether the outputs must be class scores."""
        return self in (ScoreMethod.DIVERGENCE, ScoreMethod.FISHER, ScoreMethod.HESSIAN)


DEFAULT_SCORE: Final = "default"

DEFAULT: Final = (ScoreMethod.CURVATURE, ScoreMethod.DIVERGENCE, ScoreMethod.NOISE)
"""The scores whose bits are compared where the user names none: no single one was best everywhere
(docs/mixed-precision.md)."""


def scores_called(name: str) -> tuple[ScoreMethod, ...]:
    """Return the score of a name, or those of ``default``.

    Raises:
        UsageError: there is none; the message has those that there are.
    """
    if name == DEFAULT_SCORE:
        return DEFAULT
    if name in (found := {method.value: method for method in ScoreMethod}):
        return (found[name],)
    close = difflib.get_close_matches(name, [DEFAULT_SCORE, *found], n=1)
    raise UsageError(
        f"score cannot be {name!r}",
        where="recipe",
        expected=", ".join([DEFAULT_SCORE, *found]),
        hint=f"did you mean {close[0]}?" if close else "",
    )
