"""One streaming run fills every range that was asked for; a second one lets the candidates compete."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor, fx

from normfuse.errors import BadInput
from normfuse.graph import Graph, ops, query
from normfuse.graph.quantization import QuantizationRequest, requests
from normfuse.progress import Progress, Silent
from normfuse.quant import (
    DyadicHistogram,
    ExactSum,
    Range,
    RangeMethod,
    asymmetric,
    candidates,
    quantize_dequantize,
)
from normfuse.quant.calibration_method import CalibrationMethod
from normfuse.rewrite.linear_map import read_linear_map

__all__ = ["ChosenRange", "Ranges", "calibrate"]

Source = Callable[[], Iterable[Sequence[Tensor]]]
"""Called once per run; yields one sample at a time, one tensor per input, with a batch axis of size 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChosenRange:
    """The range of one tensor, which method gave it, and the local output error of every candidate.

    ``errors`` are sums of squared differences at the outputs of the operators that read the tensor,
    relative to the smallest; empty where no competition was needed.
    """

    range: Range
    method: str
    layer: str
    observed: Range
    errors: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Ranges:
    """Chosen ranges by node name, and the number of samples they come from."""

    chosen: Mapping[str, ChosenRange]
    samples: int

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
    """Return a range for every requested tensor of the graph (ours).

    Samples run one by one, statistics are exact counts and exact sums, so the result depends neither on
    how samples were batched nor on their order; memory does not grow with their number. With
    ``AUTO`` the candidates (min-max, percentiles, MSE, entropy) compete by the squared error that they leave
    at the outputs of the operators reading the tensor.

    Args:
        graph: a float graph with requests on its nodes (``place-quantizers``).
        source: called for each run; see ``Source``.
        method: one method for all tensors, or the competition.
        total: the number of samples, for the progress bar.
        progress: shows the two runs.

    Raises:
        BadInput: there are no samples, or a tensor is not finite; the message names layer and sample.
    """
    shown = progress or Silent()
    wanted = dict(requests(graph))
    histograms = {node: DyadicHistogram() for node in wanted}
    count = _observe(graph, source, histograms, shown, total)
    offered = {node: _offer(histograms[node], request, method) for node, request in wanted.items()}
    errors: dict[fx.Node, dict[str, float]] = {}
    if any(len(ranges) > 1 for ranges in offered.values()):
        errors = _compete(graph, source, offered, wanted, shown, total)
    chosen = {node.name: _choose(node, offered[node], errors.get(node, {}), histograms[node]) for node in wanted}
    return Ranges(chosen, count)


def _observe(
    graph: Graph, source: Source, histograms: Mapping[fx.Node, DyadicHistogram], progress: Progress, total: int | None
) -> int:
    count = 0

    def watch(node: fx.Node, value: Any) -> Any:
        if (histogram := histograms.get(_own(node))) is not None:
            if not bool(torch.isfinite(value).all()):
                raise BadInput(
                    "an activation is not finite",
                    where=f"{query.layer_of(node) or node.name}, calibration sample {count}",
                    expected="finite values everywhere",
                    hint="check the model on this sample, or leave the sample out",
                )
            histogram.update(value)
        return value

    by_name = {node.name: node for node in histograms}

    def _own(node: fx.Node) -> fx.Node:
        return by_name.get(node.name, node)

    with progress.task("observing ranges", total) as advance:
        for sample in source():
            graph.run_watched(sample, watch)
            count += 1
            advance(1)
    if count == 0:
        raise BadInput("there are no calibration samples", expected="at least one sample")
    return count


ALONE: Final = {
    CalibrationMethod.MIN_MAX: (RangeMethod.MIN_MAX, "min-max"),
    CalibrationMethod.PERCENTILE: (RangeMethod.PERCENTILE, "percentile-99.99"),
    CalibrationMethod.MSE: (RangeMethod.MSE, "mse"),
    CalibrationMethod.ENTROPY: (RangeMethod.ENTROPY, "entropy"),
}
"""The range that each method gives when it is asked for alone."""


def _offer(histogram: DyadicHistogram, request: QuantizationRequest, method: CalibrationMethod) -> dict[str, Range]:
    if method is CalibrationMethod.AUTO:
        return candidates(histogram, request.type)
    kind, label = ALONE[method]
    return {label: candidates(histogram, request.type, methods=[kind])[label]}


def _compete(
    graph: Graph,
    source: Source,
    offered: Mapping[fx.Node, Mapping[str, Range]],
    wanted: Mapping[fx.Node, QuantizationRequest],
    progress: Progress,
    total: int | None,
) -> dict[fx.Node, dict[str, float]]:
    """Return, for every tensor and candidate, the squared error at the outputs of the tensor's readers."""
    sums = {node: {label: ExactSum() for label in ranges} for node, ranges in offered.items()}
    params = {
        node: {label: asymmetric(r.minimum, r.maximum, wanted[node].type) for label, r in ranges.items()}
        for node, ranges in offered.items()
    }
    weights = {node: _reader_weights(graph, node, wanted[node]) for node in offered}
    by_name = {node.name: node for node in offered}

    def watch(node: fx.Node, value: Any) -> Any:
        own = by_name.get(node.name)
        if own is not None and len(offered[own]) > 1:
            for label, candidate in params[own].items():
                difference = quantize_dequantize(value, candidate) - value
                sums[own][label].add(_output_error(difference, weights[own]))
        return value

    with progress.task("choosing ranges", total) as advance:
        for sample in source():
            graph.run_watched(sample, watch)
            advance(1)
    return {node: {label: total_.value() for label, total_ in errors.items()} for node, errors in sums.items()}


def _reader_weights(graph: Graph, node: fx.Node, request: QuantizationRequest) -> list[Tensor]:
    """Return the weights of the linear layers that read the tensor's codes; other readers count as identity."""
    weights = []
    for reader in query.readers(node):
        linear = read_linear_map(graph, reader) if reader.name in request.readers else None
        if linear is not None and reader.target is ops.LINEAR:
            weights.append(linear.weight)
    return weights


def _output_error(difference: Tensor, weights: Sequence[Tensor]) -> float:
    # Linear maps: W q(x) - W x = W (q(x) - x), so one product per candidate is enough.
    if not weights:
        return float(difference.double().square().sum())
    flat = difference.reshape(-1, difference.shape[-1])
    return sum(float((flat @ weight.mT).double().square().sum()) for weight in weights)


def _choose(
    node: fx.Node, offered: Mapping[str, Range], errors: Mapping[str, float], histogram: DyadicHistogram
) -> ChosenRange:
    label = min(offered, key=lambda name: (errors.get(name, 0.0), list(offered).index(name)))
    smallest = min(errors.values(), default=0.0)
    relative = {name: error / smallest if smallest > 0 else 1.0 for name, error in errors.items()}
    observed = Range(histogram.minimum, histogram.maximum)
    return ChosenRange(
        range=offered[label], method=label, layer=query.layer_of(node), observed=observed, errors=relative
    )
