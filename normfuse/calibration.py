"""One streaming run fills every range that was asked for; a second one lets the candidates compete."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor, fx

from normfuse.errors import BadInput
from normfuse.graph import Graph, query
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
    """Return a range for every requested tensor of the graph that the samples reach (ours).

    Samples run one by one, statistics are exact counts and exact sums, so the result depends neither on
    how samples were batched nor on their order; memory does not grow with their number. With
    ``AUTO`` the candidates (min-max, percentiles, MSE, entropy) compete by the squared error that they leave
    at the outputs of the linear maps and convolutions reading the codes; any other reader adds the error of the
    tensor itself.

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
    wanted = {request.node: request for request in requests(graph)}
    histograms = {node: DyadicHistogram() for node in wanted}
    count = _observe(graph, source, histograms, shown, total)
    seen = [request for node, request in wanted.items() if histograms[node].total]
    offered = {request.node: _offer(histograms[request.node], request, method) for request in seen}
    errors: dict[fx.Node, dict[str, float]] = {}
    if any(len(ranges) > 1 for ranges in offered.values()):
        errors = _compete(graph, source, offered, wanted, shown, total)
    chosen = {
        request.source.name: _choose(
            request, offered[request.node], errors.get(request.node, {}), histograms[request.node]
        )
        for request in seen
    }
    return Ranges(chosen, count)


def _observe(
    graph: Graph, source: Source, histograms: Mapping[fx.Node, DyadicHistogram], progress: Progress, total: int | None
) -> int:
    count = 0

    def watch(node: fx.Node, value: Any) -> Any:
        if (histogram := histograms.get(node)) is not None:
            if not bool(torch.isfinite(value).all()):
                raise BadInput(
                    "an activation is not finite",
                    where=f"{query.layer_of(node) or node.all_input_nodes[0].name}, calibration sample {count}",
                    expected="finite values everywhere",
                    hint="check the model on this sample, or leave the sample out",
                )
            histogram.update(value)
        return value

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
    sums = {node: {label: ExactSum() for label in ranges} for node, ranges in offered.items() if len(ranges) > 1}
    params = {
        node: {label: asymmetric(r.minimum, r.maximum, wanted[node].type) for label, r in ranges.items()}
        for node, ranges in offered.items()
    }
    readers = {node: [_linear_part(graph, reader) for reader in wanted[node].readers] for node in sums}

    def watch(node: fx.Node, value: Any) -> Any:
        for label, total_ in sums.get(node, {}).items():
            difference = quantize_dequantize(value, params[node][label]) - value
            total_.add(_output_error(difference, readers[node]))
        return value

    with progress.task("choosing ranges", total) as advance:
        for sample in source():
            graph.run_watched(sample, watch)
            advance(1)
    return {node: {label: total_.value() for label, total_ in errors.items()} for node, errors in sums.items()}


def _linear_part(graph: Graph, reader: fx.Node) -> Callable[[Tensor], Tensor]:
    """Return the reader without its bias if it is a linear map or a convolution, else the identity."""
    linear = read_linear_map(graph, reader)
    if linear is None:
        return lambda difference: difference
    operator: Any = reader.target
    options = {key: value for key, value in reader.kwargs.items() if key != "bias"}
    return lambda difference: operator(difference, linear.weight, None, *reader.args[3:], **options)


def _output_error(difference: Tensor, readers: Sequence[Callable[[Tensor], Tensor]]) -> float:
    # Linear maps: A q(x) - A x = A (q(x) - x), so one product per candidate is enough.
    return sum(float(reader(difference).double().square().sum()) for reader in readers)


def _choose(
    request: QuantizationRequest, offered: Mapping[str, Range], errors: Mapping[str, float], histogram: DyadicHistogram
) -> ChosenRange:
    label = min(offered, key=lambda name: (errors.get(name, 0.0), list(offered).index(name)))
    smallest = min(errors.values(), default=0.0)
    relative = {name: error / smallest if smallest > 0 else 1.0 for name, error in errors.items()}
    observed = Range(histogram.minimum, histogram.maximum)
    layer = query.layer_of(request.source)
    return ChosenRange(range=offered[label], method=label, layer=layer, observed=observed, errors=relative)
