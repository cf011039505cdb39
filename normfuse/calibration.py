"""One streaming run fills every range that was asked for; a second one lets the candidates compete."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any, Final

import torch
from torch import Tensor, fx

from normfuse.errors import BadInput
from normfuse.graph import Graph, ops, query
from normfuse.graph.quantization import QuantizationRequest, requests
from normfuse.graph.quickly import quickly
from normfuse.output_error import OutputError
from normfuse.progress import Progress, Silent
from normfuse.quant import (
    DyadicHistogram,
    ExactSum,
    QuantParams,
    Range,
    RangeMethod,
    quantize_dequantize,
)
from normfuse.quant.bits import MOST
from normfuse.quant.calibration_method import CalibrationMethod
from normfuse.quant.float_type import FloatType

__all__ = ["ChosenRange", "Ranges", "calibrate"]

Source = Callable[[], Iterable[Sequence[Tensor]]]
"""Called once per run; yields one sample at a time, one tensor per input, with a batch axis of size 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChosenRange:
    """The range of one tensor, which method gave it, and the local output error of every candidate.

    ``errors`` are sums of squared differences at the outputs of the operators that read the tensor (see
    ``calibrate``), relative to the smallest; empty where no competition was needed.
    """

    range: Range
    method: str
    layer: str
    observed: Range
    errors: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Ranges:
    """Chosen ranges by the name of the node that makes the tensor, and the number of samples they come from."""

    chosen: Mapping[str, ChosenRange]
    samples: int

    @property
    def by_name(self) -> dict[str, Range]:
        """The ranges alone."""
        return {name: found.range for name, found in self.chosen.items()}

    def as_dict(self) -> dict[str, object]:
        """Return the ranges for JSON."""
        return {"samples": self.samples, "tensors": {name: _as_dict(found) for name, found in self.chosen.items()}}


def _as_dict(found: ChosenRange) -> dict[str, object]:
    return {
        "layer": found.layer,
        "range": [found.range.minimum, found.range.maximum],
        "observed": [found.observed.minimum, found.observed.maximum],
        "method": found.method,
        "relative_errors": {label: round(error, 4) for label, error in found.errors.items()},
    }


def calibrate(
    graph: Graph,
    source: Source,
    *,
    method: CalibrationMethod = CalibrationMethod.AUTO,
    total: int | None = None,
    progress: Progress | None = None,
) -> Ranges:
    """Return a range for every requested tensor of the graph that the samples reach and whose scale is static (ours).

    Samples run one by one, statistics are exact counts and exact sums, so the result depends neither on
    how samples were batched nor on their order; memory does not grow with their number. With
    ``AUTO`` the candidates (min-max, percentiles, MSE, entropy) compete by the squared error that they leave
    at the outputs of the linear maps and convolutions reading the codes (at 8 bits, of wide maps by a sketch); any
    other reader adds the error of the tensor itself (``OutputError``). Ranges to choose from come from all samples, the
    errors that choose from at most 32, drawn by what is in them. From fewer than eight samples it takes what they saw
    and widens it, where there are 8 bits.

    Args:
        graph: a float graph with requests (``place-quantizers``).
        source: called for each run; see ``Source``.
        method: one method for all tensors, or the competition.
        total: the number of samples, for the progress bar.
        progress: shows the two runs.

    Raises:
        BadInput: there are no samples, or a tensor is not finite; the message names layer and sample.
    """
    shown = progress or Silent()
    wanted = {request.node: request for request in requests(graph) if request.group is None}
    histograms = {node: DyadicHistogram() for node in wanted}
    digests = _observe(graph, source, histograms, shown, total)
    count = len(digests)
    seen = [request for node, request in wanted.items() if histograms[node].total]
    offered = {request.node: _offer(histograms[request.node], request, method, count) for request in seen}
    errors: dict[fx.Node, dict[str, float]] = {}
    if any(len(ranges) > 1 for ranges in offered.values()):
        errors = _compete(graph, source, _drawn(digests), offered, wanted, shown)
    chosen = {
        request.source.name: _choose(
            request, offered[request.node], errors.get(request.node, {}), histograms[request.node]
        )
        for request in seen
    }
    return Ranges(chosen, count)


def _observe(
    graph: Graph, source: Source, histograms: Mapping[fx.Node, DyadicHistogram], progress: Progress, total: int | None
) -> list[bytes]:
    """Fill the histograms, return a digest of every sample."""
    digests = list[bytes]()

    def watch(node: fx.Node, value: Tensor) -> None:
        if (histogram := histograms.get(node)) is not None:
            layer = query.layer_of(node) or node.all_input_nodes[0].name
            histogram.update(value, where=f"{layer}, calibration sample {len(digests)}")

    with progress.task("observing ranges", total) as advance:
        for sample in source():
            _run(graph, sample, watch)
            digests.append(_digest(sample))
            advance(1)
    if not digests:
        raise BadInput("there are no calibration samples", expected="at least one sample")
    return digests


def _run(graph: Graph, sample: Sequence[Tensor], watch: Callable[[fx.Node, Any], None]) -> None:
    def compute(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        value = quickly(node, args, kwargs)
        watch(node, value)
        return value

    with torch.no_grad():
        graph.run_as(sample, compute)


def _digest(sample: Sequence[Tensor]) -> bytes:
    digest = sha256()
    for tensor in sample:
        digest.update(tensor.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().data)
    return digest.digest()


COMPETED: Final = 32
"""Samples that candidates compete on; a run of them costs some two of the run that observes."""


def _drawn(digests: Sequence[bytes]) -> set[int]:
    """Return the places of the samples with the smallest digests: a draw that neither order nor batches show in."""
    return set(sorted(range(len(digests)), key=lambda place: digests[place])[:COMPETED])


FEW: Final = 8
"""Samples below which ``AUTO`` widens what it saw instead of trusting it."""

WIDEST: Final = 5.0
"""How many times wider the range of one sample is made; from there to ``FEW`` samples it falls to 1."""

ALONE: Final = {
    CalibrationMethod.MIN_MAX: (RangeMethod.MIN_MAX, "min-max"),
    CalibrationMethod.PERCENTILE: (RangeMethod.PERCENTILE, "percentile-99.99"),
    CalibrationMethod.MSE: (RangeMethod.MSE, "mse"),
    CalibrationMethod.ENTROPY: (RangeMethod.ENTROPY, "entropy"),
}
"""The range that each method gives when it is asked for alone."""


def _offer(
    histogram: DyadicHistogram, request: QuantizationRequest, method: CalibrationMethod, samples: int
) -> dict[str, Range]:
    if isinstance(request.type, FloatType) and query.is_call(request.source, ops.SOFTMAX):
        return {"bounds": Range(-1.0, 1.0)}
    if method is CalibrationMethod.AUTO and samples < FEW and request.type.bits >= MOST:
        return {"min-max, widened": _widened(histogram, request, samples)}
    if method is CalibrationMethod.AUTO:
        return request.candidates(histogram)
    kind, label = ALONE[CalibrationMethod.MIN_MAX if isinstance(request.type, FloatType) else method]
    return {label: request.candidates(histogram, [kind])[label]}


def _widened(histogram: DyadicHistogram, request: QuantizationRequest, samples: int) -> Range:
    """Return the range seen, as many times wider as so few samples ask for (ours); what has bounds keeps them.

    One sample says little about the largest values of others, and 8 bits have room: five times wider costs little more
    than two of them, and what is clipped costs more.
    """
    (seen,) = request.candidates(histogram, [RangeMethod.MIN_MAX]).values()
    if query.is_call(request.source, ops.SOFTMAX):
        return seen
    factor = WIDEST ** (1 - math.log2(samples) / math.log2(FEW))
    return Range(factor * seen.minimum, factor * seen.maximum)


def _compete(
    graph: Graph,
    source: Source,
    drawn: Collection[int],
    offered: Mapping[fx.Node, Mapping[str, Range]],
    wanted: Mapping[fx.Node, QuantizationRequest],
    progress: Progress,
) -> dict[fx.Node, dict[str, float]]:
    """Return, for every tensor and candidate, the squared error at the outputs of the tensor's readers."""
    contests = {
        node: _Contest(ranges, wanted[node], _output_error(graph, wanted[node]))
        for node, ranges in offered.items()
        if len(ranges) > 1
    }

    def watch(node: fx.Node, value: Tensor) -> None:
        if (contest := contests.get(node)) is not None:
            contest.update(value)

    with progress.task("choosing ranges", len(drawn)) as advance:
        for place, sample in enumerate(source()):
            if place in drawn:
                _run(graph, sample, watch)
                advance(1)
    return {node: contest.errors() for node, contest in contests.items()}


def _output_error(graph: Graph, request: QuantizationRequest) -> OutputError:
    # Few codes leave errors of common directions, which no sketch keeps; there, time goes elsewhere anyway.
    return OutputError(graph, request.readers, is_exact=request.type.bits < MOST)


class _Contest:
    """The candidates of one tensor and their errors so far; those that make the same quantizer share one."""

    def __init__(self, offered: Mapping[str, Range], request: QuantizationRequest, error: OutputError) -> None:
        self._error = error
        self._key_of: dict[str, tuple[float, int]] = {}
        self._params: dict[tuple[float, int], QuantParams] = {}
        for label, each in offered.items():
            params = request.quantizer(each)
            self._key_of[label] = key = (float(params.scale), int(params.zero_point))
            self._params[key] = params
        self._sums = {key: ExactSum() for key in self._params}

    def update(self, value: Tensor) -> None:
        """Add what one sample's tensor loses."""
        for key, params in self._params.items():
            self._sums[key].add(self._error(quantize_dequantize(value, params).sub_(value)))

    def errors(self) -> dict[str, float]:
        """Return the sum of every candidate."""
        return {label: self._sums[key].value() for label, key in self._key_of.items()}


def _choose(
    request: QuantizationRequest, offered: Mapping[str, Range], errors: Mapping[str, float], histogram: DyadicHistogram
) -> ChosenRange:
    label = min(offered, key=lambda name: (errors.get(name, 0.0), list(offered).index(name)))
    smallest = min(errors.values(), default=0.0)
    relative = {name: error / smallest if smallest > 0 else 1.0 for name, error in errors.items()}
    observed = Range(histogram.minimum, histogram.maximum)
    layer = query.layer_of(request.source)
    return ChosenRange(range=offered[label], method=label, layer=layer, observed=observed, errors=relative)
