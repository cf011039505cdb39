"""One variant of one network while it is measured, and what is written and shown of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from torch import Tensor
from torch.nn import functional

from benchmarks.gpu_variants import Engine, Skipped, Variant
from benchmarks.vision import Network
from normfuse.bench.gpu_timing import Turn, summary
from normfuse.cli import render

__all__ = ["Candidate", "closeness", "show"]


@dataclass(slots=True, kw_only=True)
class Candidate:
    """One entry in the making: ``engine`` is there from when it is prepared until it fails."""

    batch: int
    variant: Variant
    network: Network
    engine: Engine | None = None
    status: str = "measured"
    reason: str = ""
    accuracy: dict[str, float] = field(default_factory=dict)
    turns: list[Turn] = field(default_factory=list)

    @property
    def label(self) -> str:
        """A name that no other one of the same batch has."""
        return f"{self.variant.name}, {self.network.norm}"

    def attempt(self, step: Callable[[Candidate], None]) -> None:
        """Take a step of the measurement; whatever it fails with is the entry's reason, and the others go on."""
        try:
            step(self)
        except Skipped as skipped:
            self.status, self.reason = "skipped", str(skipped)
        except Exception as error:  # noqa: BLE001 - compilers, drivers and allocators fail in ways of their own
            self.status, self.reason = "failed", f"{type(error).__name__}: {error}"
        if self.status != "measured":
            self.engine = None  # and with it the memory that the others may need

    def entry(self, others: Sequence[Candidate]) -> dict[str, Any]:
        """Return the entry for JSON; ``others`` are those of the same batch, among them the one with layer norms."""
        head = {
            "batch": self.batch,
            "variant": self.variant.name,
            "norm": self.network.norm,
            "status": self.status,
            "reason": self.reason,
        }
        if self.engine is None:
            return head
        with_layer_norms = (each for each in others if each.variant == self.variant and each.network.norm == "LN")
        base = next((each for each in with_layer_norms if each.engine is not None), None)
        return {
            **head,
            **self.engine.describe(),
            "accuracy": self.accuracy,
            **summary(self.turns),
            "against_ln": None if base is None else _ratio(base.turns, self.turns),
        }


def closeness(found: Tensor, wanted: Tensor) -> dict[str, float]:
    """Return how near logits [image, class] are to the reference's."""
    same = found.argmax(dim=1) == wanted.argmax(dim=1)
    return {
        "cosine": float(functional.cosine_similarity(found.flatten(), wanted.flatten(), dim=0)),
        "max_error": float((found - wanted).abs().max() / wanted.abs().max()),
        "top_1_agreement": 100 * float(same.double().mean()),
    }


def show(entries: Sequence[Mapping[str, Any]], title: str, device_type: str) -> None:
    """Print what was measured as a table, and why the rest was not."""
    clock = "GPU ms" if device_type == "cuda" else "call ms"
    columns = ("variant", "norm", clock, "p99 ms", "spread", "enqueue ms", "images/s", "against LN", "cosine", "top-1")
    render.table(title, columns, [_row(each) for each in entries if each["status"] == "measured"])
    for each in entries:
        if each["status"] != "measured":
            first = each["reason"].partition("\n")[0]
            render.line(f"{each['status']}: {each['variant']}, {each['norm']}: {first}")


def _ratio(slow: Sequence[Turn], fast: Sequence[Turn]) -> float:
    """Return the median of the rounds' ratios: drift of the machine falls on both sides of each."""
    return median(median(a.compute) / median(b.compute) for a, b in zip(slow, fast, strict=True))


def _row(entry: Mapping[str, Any]) -> tuple[str | None, ...]:
    ratio, accuracy = entry["against_ln"], entry["accuracy"]
    return (
        entry["variant"],
        entry["norm"],
        f"{entry['gpu_ms']['median']:.3f}",
        f"{entry['gpu_ms']['p99']:.3f}",
        f"{100 * entry['spread']:.1f} %",
        f"{entry['enqueue_ms']['median']:.3f}",
        f"{entry['batch'] * entry['throughput_qps']:,.0f}",
        None if ratio is None else f"{ratio:.2f}x",
        f"{accuracy['cosine']:.5f}",
        f"{accuracy['top_1_agreement']:.1f} %",
    )
