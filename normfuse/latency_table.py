"""What every linear map of a network takes at every choice of bits, as a table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from normfuse.quant.bits import Bits

__all__ = ["Conditions", "LatencyTable"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Conditions:
    """What latencies hold for: the processor, onnxruntime's version and threads, the samples of one run."""

    processor: str
    instruction_set: str
    onnxruntime: str
    threads: int
    batch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LatencyTable:
    """Measured seconds of one run, by the name of the linear map's node and its bits.

    In it are the maps that are to be quantized. The rest of a network (norms, attention, sums, maps that stay float)
    is not, and every figure has one call of onnxruntime in it. So a caller measures one whole engine and takes its
    maps' seconds away: what is left, plus the maps' seconds at other bits, is the estimate for these. The calls cancel
    out, and what is left of a small network may be below zero.

    Maps that share something are measured as if they did not: a quantizer that several read behind counts in each, and
    convolutions in a row change layout and codes between them. Weights are in the caches, as they seldom are in large
    networks.

    Attributes:
        seconds: by map, in graph order, and bits.
        missing: by map and bits, why there is no figure.
        measured_on: what the figures hold for.
        spread: the largest deviation of any round from the median of its rounds, relative to it.
    """

    seconds: Mapping[str, Mapping[Bits, float]]
    missing: Mapping[str, Mapping[Bits, str]] = field(default_factory=dict)
    measured_on: Conditions
    spread: float
