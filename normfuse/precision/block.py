"""One segment of a network between what came in in float, what comes in quantized, and what should come out."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from normfuse.graph import Graph
from normfuse.graph.segments import Compute, Segment, run_segment
from normfuse.precision.decision import Quantization
from normfuse.precision.simulation import Simulation, in_float

__all__ = ["Block"]

Values = dict[fx.Node, Any]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Block:
    """A segment with its data, chunk by chunk.

    Attributes:
        graph: a float graph with requests.
        segment: what the block computes.
        entries: per chunk what the quantized network before it makes.
        exact: per chunk what the float network before it makes.
        targets: per chunk the segment's floating-point exits in the float network.
        rest: all that comes after the segment.
        answers: per chunk the floating-point outputs of the float network.
        foresight: the weight of their error in the loss.
        held_out: how many chunks at the end judge and do not teach.
        weights: what an error at each element of the floating-point exits counts; None: all alike.
    """

    graph: Graph
    segment: Segment
    entries: Sequence[Values]
    exact: Sequence[Values]
    targets: Sequence[Sequence[Tensor]]
    rest: Segment
    answers: Sequence[Sequence[Tensor]]
    foresight: float
    held_out: int
    weights: Sequence[Tensor] | None = None

    @property
    def teaching(self) -> range:
        """The chunks to learn from; all, if there are too few to hold some out."""
        return range(max(len(self.entries) - self.held_out, 1))

    @property
    def judging(self) -> range:
        """The chunks that decide what is kept."""
        first = len(self.entries) - self.held_out if len(self.entries) > self.held_out else 0
        return range(first, len(self.entries))

    def inputs_of(self, node: fx.Node, chunk: int, compute: Compute, *, is_exact: bool) -> Tensor:
        """Return what one linear map of the block reads, behind quantizers or in the float network."""
        found = list[Tensor]()

        def watch(call: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if call is node:
                found.append(args[0])
            return compute(call, args, kwargs)

        run_segment(self.graph, self.segment, dict((self.exact if is_exact else self.entries)[chunk]), watch)
        return found[0]

    def loss(self, chunk: int, compute: Compute) -> Tensor:
        """Return the squared error of the exits over the squares of the targets, summed over the exits.

        With foresight the same for the network's outputs is added, the rest of the network computed in float: what
        the rest makes of an error counts, not only its size. (GLF-Q, 2026, adds the features before the head alike.)
        """
        values = dict(self.entries[chunk])
        run_segment(self.graph, self.segment, values, compute)
        near = summed_error(tensors_of(self.segment.exits, values), self.targets[chunk], self.weights)
        if not (self.foresight and self.rest.nodes):
            return near
        run_segment(self.graph, self.rest, values, in_float)
        return near + self.foresight * summed_error(tensors_of(self.graph.outputs, values), self.answers[chunk])

    def error(self, decided: Quantization, chunks: Iterable[int]) -> float:
        """Return the mean loss of a decision over chunks."""
        simulation = Simulation(decided)
        with torch.no_grad():
            losses = [float(self.loss(chunk, simulation)) for chunk in chunks]
        return sum(losses) / len(losses)


def tensors_of(nodes: Iterable[fx.Node], values: Values) -> list[Tensor]:
    """Return the floating-point values of nodes (sizes and masks are not learned)."""
    found = (values[node] for node in nodes)
    return [value for value in found if isinstance(value, Tensor) and value.is_floating_point()]


def forget(values: Values, later: Collection[fx.Node]) -> None:
    """Let go of the values that nobody reads later."""
    for node in [node for node in values if node not in later]:
        del values[node]


def summed_error(found: Sequence[Tensor], wanted: Sequence[Tensor], weights: Sequence[Tensor] | None = None) -> Tensor:
    """Return the sum of the tensors' relative errors."""
    weights = [torch.ones(()) for _ in wanted] if weights is None else weights
    return torch.stack([relative_error(*each) for each in zip(found, wanted, weights, strict=True)]).sum()


def relative_error(found: Tensor, wanted: Tensor, weight: Tensor) -> Tensor:
    """Return ``sum weight (found - wanted)^2 / sum weight wanted^2``."""
    size = (weight * wanted.square()).sum().clamp(min=torch.finfo(wanted.dtype).tiny)
    return (weight * (found - wanted).square()).sum() / size
