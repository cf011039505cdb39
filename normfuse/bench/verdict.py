"""Kept, partly kept, or fell back: decided from what was measured, with the reasons in words."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from normfuse.bench.comparison import Comparison

__all__ = ["Judgement", "Verdict", "judge"]


class Verdict(Enum):
    """What became of the quantized engine."""

    KEPT = "kept"
    PARTLY_KEPT = "partly kept"
    FELL_BACK = "fell back"


@dataclass(frozen=True, slots=True)
class Judgement:
    """The verdict and why."""

    verdict: Verdict
    reasons: tuple[str, ...]

    def as_dict(self) -> dict[str, object]:
        """Return the judgement for JSON."""
        return {"verdict": self.verdict.value, "reasons": list(self.reasons)}


def judge(comparison: Comparison, label: str, *, max_drop: float, min_speedup: float) -> Judgement:
    """Judge an engine against the comparison's baseline.

    Args:
        comparison: both engines, measured in one run.
        label: the quantized engine's row.
        max_drop: top-1 points that may be lost.
        min_speedup: how many times faster it must be.
    """
    base, row = comparison.row(comparison.baseline), comparison.row(label)
    failed, held = list[str](), list[str]()
    speedup = comparison.speedup(label)
    if speedup is None:
        held.append("speed was not measured")
    else:
        said = f"{speedup:.2f} times as fast as {comparison.baseline}, {min_speedup:.2f} wanted"
        (held if speedup >= min_speedup else failed).append(said)
    if base.accuracy is not None and row.accuracy is not None:
        drop = base.accuracy.top_1 - row.accuracy.top_1
        said = f"top-1 {row.accuracy.top_1:.2f} against {base.accuracy.top_1:.2f}, a drop of {max_drop:.2f} allowed"
        (held if drop <= max_drop else failed).append(said)
    elif row.closeness is not None:
        held.append(
            f"no labels: accuracy was not judged; same top-1 as float on {row.closeness.agreement:.2f} % "
            f"of {row.closeness.total} samples, outputs at {row.closeness.sqnr:.1f} dB"
        )
    verdict = Verdict.FELL_BACK if failed else Verdict.KEPT
    return Judgement(verdict, (*failed, *held))
