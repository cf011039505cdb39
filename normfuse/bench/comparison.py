"""Engines side by side: latency, throughput, memory, size, accuracy."""

from __future__ import annotations

from dataclasses import dataclass

from normfuse.bench.accuracy import Accuracy, Closeness
from normfuse.bench.timing import Timing

__all__ = ["Comparison", "Row"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """What was measured of one engine; None where it was not."""

    label: str
    timing: Timing | None = None
    peak_bytes: int | None = None
    file_bytes: int | None = None
    accuracy: Accuracy | None = None
    closeness: Closeness | None = None

    def as_dict(self) -> dict[str, object]:
        """Return the row for JSON."""
        closeness = self.closeness
        return {
            "label": self.label,
            **(self.timing.as_dict() if self.timing else {}),
            "peak_bytes": self.peak_bytes,
            "file_bytes": self.file_bytes,
            "top_1": None if self.accuracy is None else self.accuracy.top_1,
            "samples": None if self.accuracy is None else self.accuracy.total,
            "agreement": None if closeness is None else closeness.agreement,
            "sqnr_db": None if closeness is None else closeness.sqnr,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Rows of one run, all with the same batch, threads and inputs; ``baseline`` names the row compared with."""

    rows: tuple[Row, ...]
    baseline: str
    batch: int
    threads: int

    def row(self, label: str) -> Row:
        """Return a row by its label."""
        return next(row for row in self.rows if row.label == label)

    def speedup(self, label: str) -> float | None:
        """Return how many times faster than the baseline (median of the rounds' ratios)."""
        base, other = self.row(self.baseline).timing, self.row(label).timing
        if base is None or other is None:
            return None
        ratios = sorted(a / b for a, b in zip(base.rounds, other.rounds, strict=True))
        middle = len(ratios) // 2
        return ratios[middle] if len(ratios) % 2 else (ratios[middle - 1] + ratios[middle]) / 2

    def as_dict(self) -> dict[str, object]:
        """Return the comparison for JSON."""
        rows = [{**row.as_dict(), "speedup": self.speedup(row.label)} for row in self.rows]
        return {"baseline": self.baseline, "batch": self.batch, "threads": self.threads, "rows": rows}
