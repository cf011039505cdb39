"""How many octaves an exponential by shifts spans: as published, or as many as its sums bear."""

from __future__ import annotations

from normfuse.kernels.reference.shift_exponential import LARGEST
from normfuse.quant.dyadic import require_below

__all__ = ["octaves"]


def octaves(x0: int, terms: int, *, published: int, where: str) -> int:
    """Return n, at most the published one, for which so many exponentials of |x0| 2^n are below 2^31 in sum (ours).

    A sum of 2^31 or more is cut, and what is divided by it comes out too large. Fewer octaves than published hurt
    little there: 8-bit codes span 254 * 1.4375 / |x0| of them, which is less than n wherever n is below 15 for 2,048
    terms or fewer, so that no exponential is on its floor for it.

    Args:
        x0: see ``shift_exponential``.
        terms: how many exponentials are summed up.
        published: n where nothing is cut.
        where: the layer.

    Raises:
        UnsupportedModel: not even one octave fits.
    """
    found = max(1, min(published, (LARGEST // (terms * -x0)).bit_length() - 1))
    require_below(float(terms * (-x0 << found)), LARGEST + 1, what="a sum of exponentials by shifts", where=where)
    return found
