"""Kept, partly kept, or fell back: decided from what was measured, with the reasons in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Final

from normfuse.bench.comparison import Comparison
from normfuse.bench.confidence import median_interval

__all__ = ["SMALLEST_SQNR", "Judgement", "Verdict", "judge"]

SMALLEST_SQNR: Final = 10.0
"""Decibels: noise with a tenth of the output's power. It catches an engine that is broken, and proves no accuracy."""

MEASURE_AGAIN: Final = "measure again on a quiet machine"


class Verdict(Enum):
    """What became of the quantized engine."""

    KEPT = "kept"
    PARTLY_KEPT = "partly kept"
    FELL_BACK = "fell back"


@dataclass(frozen=True, slots=True)
class Judgement:
    """The verdict and why: what failed first, then what held and what could not be judged."""

    verdict: Verdict
    reasons: tuple[str, ...]

    def as_dict(self) -> dict[str, object]:
        """Return the judgement for JSON."""
        return {"verdict": self.verdict.value, "reasons": list(self.reasons)}


@dataclass(frozen=True, slots=True)
class _Finding:
    holds: bool
    said: str


def judge(
    comparison: Comparison,
    label: str,
    *,
    max_drop: float,
    min_speedup: float = 1.0,
    min_sqnr: float = SMALLEST_SQNR,
    exceptions: Sequence[str] = (),
) -> Judgement:
    """Judge an engine against the comparison's baseline.

    Args:
        comparison: both engines, measured in one run.
        label: the quantized engine's row.
        max_drop: points of the score (top-1, mean IoU) that may be lost.
        min_speedup: how many times faster it must be; it is too slow where the rounds show it, not by their noise.
        min_sqnr: decibels that the outputs must be above their difference, where labels are missing.
        exceptions: what is not as it was asked for, in words; with some, what holds is partly kept.
    """
    findings = (_speed(comparison, label, min_speedup), _accuracy(comparison, label, max_drop, min_sqnr))
    failed = [finding.said for finding in findings if not finding.holds]
    held = [finding.said for finding in findings if finding.holds]
    if failed:
        return Judgement(Verdict.FELL_BACK, (*failed, *held))
    if exceptions:
        return Judgement(Verdict.PARTLY_KEPT, (*exceptions, *held))
    return Judgement(Verdict.KEPT, tuple(held))


def _speed(comparison: Comparison, label: str, wanted: float) -> _Finding:
    rounds, speedup = comparison.speedups(label), comparison.speedup(label)
    if speedup is None:
        return _Finding(True, "speed was not measured")
    said = (
        f"{speedup:.3g} times as fast as {comparison.baseline} "
        f"({len(rounds)} rounds: {min(rounds):.3g} to {max(rounds):.3g}), {wanted:.3g} wanted"
    )
    if speedup >= wanted:
        return _Finding(True, said)
    _, highest = median_interval(rounds)
    if highest >= wanted:
        return _Finding(True, f"the rounds do not show that it is too slow: {said}; {MEASURE_AGAIN}")
    return _Finding(
        False, f"slower than {comparison.baseline}: {said}" if highest < 1 else f"too little faster: {said}"
    )


def _accuracy(comparison: Comparison, label: str, max_drop: float, min_sqnr: float) -> _Finding:
    base, row = comparison.row(comparison.baseline), comparison.row(label)
    if base.score is not None and row.score is not None:
        drop = base.score.drop(row.score)
        said = (
            f"{row.score.metric.title} {row.score.percent:.2f} % after {base.score.percent:.2f} % "
            f"on {row.score.total} samples: "
            f"{_change(drop)}, a drop of {max_drop:.2f} is allowed"
        )
        return _Finding(True, said) if drop <= max_drop else _Finding(False, f"accuracy fell too far: {said}")
    near = row.closeness
    if near is None:
        return _Finding(True, "accuracy was not judged: there was nothing to evaluate on")
    on = f"{near.total} samples"
    if near.agreement is not None:
        on = f"same top-1 as {comparison.baseline} on {near.agreement:.2f} % of {on}"
    said = f"{on}, outputs {near.sqnr:.1f} dB above their difference, {min_sqnr:.1f} wanted"
    if near.sqnr >= min_sqnr:  # false for NaN
        return _Finding(True, f"accuracy was not judged, there are no labels: {said}")
    return _Finding(False, f"the outputs are not the model's any more (there are no labels to judge by): {said}")


def _change(drop: float) -> str:
    return f"{abs(drop):.2f} points {'lost' if drop > 0 else 'gained'}" if drop else "nothing lost"
