"""What may be done at the tensors that linear maps read, what error it leaves, and which of it is taken."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from torch import Tensor

from normfuse.graph.affine import Affine
from normfuse.rewrite.equalization import Equalization

__all__ = ["NOTHING", "Candidate", "Offer", "taken"]

NOTHING: Final = ""
"""The offer that leaves a tensor as it is."""

SMALLEST_GAIN: Final = 0.2
"""The part of its blocks' error that a product has to take away: at less, its time is not worth it."""


@dataclass(slots=True)
class Offer:
    """An equalization that may be taken: the affine of each reader's input, and the errors it has left so far.

    ``judging`` is the error on the samples held out, by block.
    """

    affine: Affine
    carried: dict[str, Affine]
    teaching: float = 0.0
    judging: dict[int, float] = field(default_factory=dict)


@dataclass(slots=True)
class Candidate:
    """A tensor, the maps that read it, and what was tried there.

    With ``is_product`` nothing that makes it can be scaled, so a product would be computed for its readers.
    """

    name: str
    axis: int
    groups: Tensor
    readers: list[str]
    is_product: bool = False
    offers: dict[str, Offer] = field(default_factory=dict)

    @property
    def best(self) -> str:
        """The offer that is best where it is chosen."""
        return min(self.offers, key=lambda name: self.offers[name].teaching)

    @property
    def gains(self) -> dict[int, float]:
        """The error that goes with the best offer where it is judged, by block; less than zero where it does harm."""
        before, after = self.offers[NOTHING].judging, self.offers[self.best].judging
        return {block: before[block] - after[block] for block in after}


def taken(candidates: Sequence[Candidate], whole: Mapping[int, float]) -> dict[str, Equalization]:
    """Return what is taken, by tensor: what costs nothing wherever it helps, products only by a clear margin (ours).

    Args:
        candidates: with the errors of all that was tried.
        whole: by block, its error with all its maps quantized as they are, on the samples held out.
    """
    found = dict[str, Equalization]()
    for each in candidates:
        label, gains = each.best, each.gains
        least = SMALLEST_GAIN * sum(whole[block] for block in gains) if each.is_product else 0.0
        if label == NOTHING or sum(gains.values()) <= least:
            continue
        found[each.name] = Equalization(
            affine=each.offers[label].affine,
            how=label,
            before=sum(each.offers[NOTHING].judging.values()),
            after=sum(each.offers[label].judging.values()),
            is_product=each.is_product,
        )
    return found
