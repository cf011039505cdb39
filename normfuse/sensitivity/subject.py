"""What is scored: a network, samples, and the codes of every weight and activation at every width that it may get."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from torch import Tensor, fx

from normfuse.calibration import Ranges, calibrate
from normfuse.feeding import Stream
from normfuse.graph import Graph
from normfuse.graph.quantization import QuantizationRequest, requested_weights, requests
from normfuse.precision.assignment import PlacementOf, assigned, may_narrow, wanted_weight
from normfuse.precision.chunks import samples_in
from normfuse.precision.decision import Quantization
from normfuse.progress import Progress, Silent
from normfuse.quant import ActivationParams, RoundedWeight
from normfuse.quant.bits import FLOAT, MOST, Bits
from normfuse.quant.calibration_method import CalibrationMethod
from normfuse.quant.output_kind import OutputKind
from normfuse.rewrite.linear_map import read_linear_map
from normfuse.sensitivity.output_loss import OutputLoss
from normfuse.sensitivity.targets import Target, default_target, magnitude_target

__all__ = ["Subject", "ranges_by_width"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Subject:
    """A network whose parts can have several widths.

    Attributes:
        graph: folded, float, with requests of the target's widest codes (``place-quantizers``).
        chunks: batches of samples, one tensor per input.
        placement_of: the target.
        weight_widths: bits of codes that weights can have, fewest first; floats need no score.
        activation_widths: the same of activations; none where they stay float.
        ranges: of every width of activations, and of eight bits.
        outputs: what the network's outputs are.
    """

    graph: Graph
    chunks: Sequence[Sequence[Tensor]]
    placement_of: PlacementOf
    weight_widths: tuple[int, ...]
    activation_widths: tuple[int, ...]
    ranges: Mapping[int, Ranges]
    outputs: OutputKind = OutputKind.AUTO
    _rounded: dict[tuple[str, int], RoundedWeight] = field(default_factory=dict)

    @cached_property
    def maps(self) -> tuple[fx.Node, ...]:
        """The linear maps whose weights are scored, in graph order."""
        return tuple(node for node in requested_weights(self.graph) if read_linear_map(self.graph, node) is not None)

    @cached_property
    def activations(self) -> tuple[QuantizationRequest, ...]:
        """The requests that are scored: those that linear maps read and that may be narrowed."""
        maps = set(self.maps)
        found = (request for request in requests(self.graph) if maps & set(request.readers))
        return tuple(request for request in found if may_narrow(request))

    @cached_property
    def loss(self) -> OutputLoss:
        """How outputs are compared."""
        return OutputLoss.of(self.graph, self.outputs)

    @property
    def target(self) -> Target:
        """What relevance starts from: outputs that are compared as values are no classes."""
        return magnitude_target if self.loss is OutputLoss.NOISE else default_target

    @property
    def samples(self) -> int:
        """How many samples there are."""
        return sum(samples_in(chunk) for chunk in self.chunks)

    def weight(self, node: fx.Node, bits: int) -> RoundedWeight:
        """Return a map's weight rounded to nearest."""
        key = (node.name, bits)
        if key not in self._rounded:
            linear = read_linear_map(self.graph, node)
            assert linear is not None
            widest = max(self.activation_widths, default=FLOAT)
            asked = wanted_weight(node, self.placement_of(Bits(bits, widest)))
            self._rounded[key] = asked.nearest(linear.weight, linear.bias, input_scale=None)
        return self._rounded[key]

    def params(self, request: QuantizationRequest, bits: int) -> ActivationParams | None:
        """Return the codes of an activation, None where the samples do not reach it."""
        found = self.ranges[bits].chosen.get(request.source.name)
        type_ = self.placement_of(Bits(MOST, bits)).activation
        assert type_ is not None
        return None if found is None else found.range.quantizer(type_, is_symmetric=request.is_symmetric)

    def uniform(self, bits: Bits) -> Quantization:
        """Return the decision that gives every part these bits, rounded to nearest."""
        params = {each.source.name: self.params(each, bits.activation) for each in self.activations}
        return Quantization(
            activations={name: each for name, each in params.items() if each is not None},
            weights={node.name: self.weight(node, bits.weight) for node in self.maps},
        )

    def ranges_of(self, graph: Graph) -> Ranges:
        """Return the ranges for a graph with requests of other widths: each tensor's are those of its own."""
        asked = {request.source.name: request.type.bits for request in requests(graph)}
        by_width = {name: self.ranges.get(bits, self.ranges[MOST]) for name, bits in asked.items()}
        chosen = {name: found.chosen[name] for name, found in by_width.items() if name in found.chosen}
        return Ranges(chosen, self.ranges[MOST].samples)


def ranges_by_width(
    graph: Graph,
    samples: Stream,
    *,
    placement_of: PlacementOf,
    widths: Sequence[int],
    method: CalibrationMethod = CalibrationMethod.AUTO,
    progress: Progress | None = None,
) -> dict[int, Ranges]:
    """Return the ranges that a calibration gives all narrowed activations at each width, and at eight bits.

    Ranges of one tensor depend on its own width alone, as the network runs in float while they are found.
    """
    found = dict[int, Ranges]()
    for width in sorted({*widths, MOST} - {FLOAT}):
        bits = {node.name: Bits(MOST, width) for node in requested_weights(graph)}
        narrowed = assigned(graph, bits, placement_of)
        found[width] = calibrate(narrowed, samples, method=method, progress=progress or Silent())
    return found
