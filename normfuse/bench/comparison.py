"""Engines side by side: latency, throughput, memory, size, accuracy, and their ratios."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import median

from normfuse.bench.accuracy import Closeness, Metric, Score
from normfuse.bench.timing import Timing
from normfuse.errors import UsageError

__all__ = ["Comparison", "Row", "round_ratios"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """What was measured of one engine; None where it was not."""

    label: str
    timing: Timing | None = None
    peak_bytes: int | None = None
    file_bytes: int | None = None
    score: Score | None = None
    closeness: Closeness | None = None

    def as_dict(self) -> dict[str, object]:
        """Return the row for JSON; ``sqnr_db`` is None where it is not finite (``same_outputs`` tells why)."""
        score, closeness = self.score, self.closeness
        return {
            "label": self.label,
            **(self.timing.as_dict() if self.timing else {}),
            "peak_bytes": self.peak_bytes,
            "file_bytes": self.file_bytes,
            **{metric.value: score.percent if score and score.metric is metric else None for metric in Metric},
            "samples": None if score is None else score.total,
            "agreement": None if closeness is None else closeness.agreement,
            "sqnr_db": closeness.sqnr if closeness is not None and math.isfinite(closeness.sqnr) else None,
            "same_outputs": None if closeness is None else closeness.sqnr == math.inf,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Rows of one run, all with the same batch, threads and inputs; ``baseline`` names the row compared with."""

    rows: tuple[Row, ...]
    baseline: str
    batch: int
    threads: int

    def row(self, label: str) -> Row:
        """Return a row by its label.

        Raises:
            UsageError: there is none of that label.
        """
        for row in self.rows:
            if row.label == label:
                return row
        raise UsageError(f"no engine {label} was measured", expected=", ".join(row.label for row in self.rows))

    def speedups(self, label: str) -> tuple[float, ...]:
        """Return how many times faster than the baseline the row was, round by round; empty where not measured."""
        base, other = self.row(self.baseline).timing, self.row(label).timing
        if base is None or other is None:
            return ()
        return round_ratios(base, other)

    def speedup(self, label: str) -> float | None:
        """Return how many times faster than the baseline (median of the rounds' ratios)."""
        ratios = self.speedups(label)
        return median(ratios) if ratios else None

    def ratios(self, label: str) -> dict[str, float | None]:
        """Return the row against the baseline.

        ``speedup`` with its lowest and highest round, ``file`` and ``memory`` as the row's share of the
        baseline's, ``drop`` in points of the score; None where one of the two was not measured.
        """
        base, row, rounds = self.row(self.baseline), self.row(label), self.speedups(label)
        judged = base.score is not None and row.score is not None
        return {
            "speedup": self.speedup(label),
            "speedup_lowest": min(rounds, default=None),
            "speedup_highest": max(rounds, default=None),
            "file": _share(row.file_bytes, base.file_bytes),
            "memory": _share(row.peak_bytes, base.peak_bytes),
            "drop": base.score.drop(row.score) if judged else None,  # type: ignore[union-attr,arg-type]  # judged
        }

    def as_dict(self) -> dict[str, object]:
        """Return the comparison for JSON; ``speedup`` also stands in the row itself."""
        rows = [
            {**row.as_dict(), "speedup": self.speedup(row.label), "ratios": self.ratios(row.label)} for row in self.rows
        ]
        return {"baseline": self.baseline, "batch": self.batch, "threads": self.threads, "rows": rows}


def round_ratios(base: Timing, other: Timing) -> tuple[float, ...]:
    """Return how many times faster ``other`` was, round by round."""
    return tuple(slow / fast for slow, fast in zip(base.rounds, other.rounds, strict=True))


def _share(value: int | None, of: int | None) -> float | None:
    return value / of if value is not None and of else None
