"""What is tried to keep the accuracy, lever by lever; an effort is the set of them that its time allows."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, fields, replace
from enum import IntEnum
from typing import Final, Self

from normfuse.errors import UsageError
from normfuse.quant.bits import MOST, Bits

__all__ = ["Effort", "Levers"]


class Effort(IntEnum):
    """How long it may take: seconds, minutes, tens of minutes. The value is what recipes and the command line write."""

    NEAREST = 0  # every weight to its nearest code
    CLOSED_FORM = 1  # below eight bits: second-order error feedback, bias correction, affine refit
    LEARNED = 2  # and weights and steps learned block by block, then all affines together


REFINEMENTS: Final = ("error_feedback", "bias_correction", "affine_refit", "reconstruction")

NEEDED: Final = {
    "asymmetric_correction": ("error_feedback",),
    "coordinate_descent": ("error_feedback",),
    "soft_rounding": ("reconstruction",),
    "drop": ("reconstruction",),
    "foresight": REFINEMENTS,
    "curvature": REFINEMENTS,
}
"""What a lever works on: without one of these it does nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Levers:
    """What is tried.

    Five are refinements, kept where they lower the error on samples held out (with one chunk of samples, on these):
    ``error_feedback``, ``bias_correction``, ``affine_refit``, ``reconstruction`` and
    ``affine_tuning``. The others say how these work, or by what error they are judged.

    Attributes:
        error_feedback: weights rounded by GPTQ, in the order of their inputs' size.
        asymmetric_correction: it counts the error of quantized inputs too.
        coordinate_descent: its codes are improved one by one.
        bias_correction: biases give every map the mean output that it has in float.
        affine_refit: a factor and an offset for every output, by least squares.
        reconstruction: weights, scales, zero points and biases learned block by block.
        soft_rounding: in place of straight-through gradients (AdaRound).
        drop: a quarter of the activations stays float while a block learns (QDrop).
        foresight: the error at the network's outputs counts beside the block's.
        curvature: the error at a block's exits counts by what it does to the outputs, by least squares: a cheaper
            foresight.
        affine_tuning: scales, zero points and biases of the whole network learned together, after its blocks.
    """

    error_feedback: bool = False
    asymmetric_correction: bool = False
    coordinate_descent: bool = True
    bias_correction: bool = False
    affine_refit: bool = False
    reconstruction: bool = False
    soft_rounding: bool = False
    drop: bool = True
    foresight: bool = False
    curvature: bool = False
    affine_tuning: bool = False

    @classmethod
    def of(cls, effort: Effort, bits: Bits) -> Self:
        """Return those of an effort; at eight bits rounding to nearest is near the float network already."""
        learns, is_low = effort is Effort.LEARNED, bits.weight < MOST or bits.activation < MOST
        closed = learns or (effort is Effort.CLOSED_FORM and is_low)
        return cls(
            error_feedback=closed,
            bias_correction=closed,
            affine_refit=closed,
            reconstruction=learns,
            foresight=learns,
            affine_tuning=learns,
        )

    def changed(self, text: str) -> Self:
        """Return them with some pulled or let go: ``"+soft-rounding -foresight"``, divided by blanks or commas.

        Raises:
            UsageError: a word is no lever, has neither sign, pulls one that does nothing without another, or changes
                nothing.
        """
        known = {field.name.replace("_", "-"): field.name for field in fields(self)}
        words = text.replace(",", " ").split()
        found = self
        for word in words:
            sign, name = word[0], word[1:]
            if sign not in "+-" or name not in known:
                close = difflib.get_close_matches(word.lstrip("+-"), known, n=1)
                raise UsageError(
                    f"levers cannot have {word!r}",
                    where="recipe",
                    expected=f"+ or - in front of {', '.join(known)}",
                    hint=f"did you mean {sign if sign in '+-' else '+'}{close[0]}?" if close else "",
                )
            found = replace(found, **{known[name]: sign == "+"})
        for word in words:
            self._refuse_idle(found, word, known[word[1:]])
        return found

    def _refuse_idle(self, found: Self, word: str, name: str) -> None:
        """Refuse a word that makes no difference between these levers and those found with all words."""
        needed, pulls = NEEDED.get(name, ()), word[0] == "+"
        if pulls and not found._works(name):
            raise UsageError(
                f"the lever {word} does nothing here",
                where="recipe",
                expected=" or ".join(each.replace("_", "-") for each in needed) + " beside it",
                hint="pull that too, or choose an effort that has it",
            )
        if self._works(name) is pulls:
            raise UsageError(
                f"the lever {word} changes nothing",
                where="recipe",
                expected=f"a lever that is not {'pulled' if pulls else 'let go'} already at this effort and bits",
                hint="leave it out, or choose another effort; docs/quantization.md says what is on where",
            )

    def _works(self, name: str) -> bool:
        """Return whether a lever is pulled and something that it works on is."""
        needed = NEEDED.get(name, ())
        return getattr(self, name) and (not needed or any(getattr(self, each) for each in needed))
