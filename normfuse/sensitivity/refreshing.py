"""Scores taken again on the network that they have led to, where parts meet the errors of all others."""

from __future__ import annotations

from normfuse.precision.decision import Quantization
from normfuse.progress import Progress
from normfuse.sensitivity.one_at_a_time import one_at_a_time
from normfuse.sensitivity.sensitivity import Kind, Sensitivity, Tally
from normfuse.sensitivity.subject import Subject

__all__ = ["refreshed"]


def refreshed(subject: Subject, decided: Quantization, *, name: str, progress: Progress) -> Sensitivity:
    """Return what the outputs lose with one part at each width in a quantized network, above its best width.

    Each part is rounded to nearest while the rest stays as it was decided. (Ours; LampQ, 2025, re-estimates its score
    on the quantized model two or three times.)

    Args:
        subject: what is scored.
        decided: the network: a decision for the subject's graph.
        name: of the result.
        progress: shows the segments.
    """
    (found,) = one_at_a_time(subject, [subject.loss], base=decided, progress=progress)
    tally = Tally()
    for kind in Kind:
        for part, row in found.of(kind).items():
            least = min(row.values())
            for bits, amount in row.items():
                tally.add(kind, part, bits, amount - least)
    return tally.sensitivity(name)
