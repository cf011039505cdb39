"""One segment of a network between what came in in float, what comes in quantized, and what should come out."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from normfuse.graph import Graph
from normfuse.graph.quantization import requested_weights
from normfuse.graph.quickly import quickly
from normfuse.graph.segments import Compute, Segment, leading_to, run_segment
from normfuse.heap import give_back_memory
from normfuse.precision.chunks import Split
from normfuse.precision.decision import Quantization
from normfuse.precision.simulation import Simulation, in_float
from normfuse.precision.whereabouts import not_finite

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
        numbers: per chunk the numbers of its samples, for messages.
        rest: all that comes after the segment.
        answers: per chunk the floating-point outputs of the float network.
        foresight: the weight of their error in the loss.
        split: the chunks to learn from, and those that decide what is kept.
        weights: what an error at each element of the floating-point exits counts; None: all alike.
        targets: of the chunks that were asked for, see ``target``.
    """

    graph: Graph
    segment: Segment
    entries: Sequence[Values]
    exact: Sequence[Values]
    numbers: Sequence[Sequence[int]]
    rest: Segment
    answers: Sequence[Sequence[Tensor]]
    foresight: float
    split: Split
    weights: Sequence[Tensor] | None = None
    targets: dict[int, Sequence[Tensor]] = field(default_factory=dict)

    def inputs_of(self, node: fx.Node, chunk: int, compute: Compute, *, is_exact: bool) -> Tensor:
        """Return what one linear map of the block reads, behind quantizers or in the float network."""
        source = node.args[0]
        assert isinstance(source, fx.Node)
        values = dict((self.exact if is_exact else self.entries)[chunk])
        run_segment(self.graph, leading_to(self.segment, source), values, compute)
        found: Tensor = values[source]
        return found

    def target(self, chunk: int) -> Sequence[Tensor]:
        """Return the segment's floating-point exits in the float network; made when first asked for, as few may be.

        Raises:
            BadInput: what a linear map reads is not finite; the message names layer and sample.
        """
        if (found := self.targets.get(chunk)) is None:
            values, maps = dict(self.exact[chunk]), requested_weights(self.graph)

            def compute(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
                if node in maps and not bool(args[0].isfinite().all()):
                    raise not_finite(node, ~args[0].isfinite(), self.numbers[chunk])
                return quickly(node, args, kwargs)

            with torch.no_grad():
                run_segment(self.graph, self.segment, values, compute)
            found = self.targets[chunk] = tensors_of(self.segment.exits, values)
        return found

    def loss(self, chunk: int, compute: Compute) -> Tensor:
        """Return the squared error of the exits over the squares of the targets, summed over the exits.

        With foresight the same for the network's outputs is added, the rest of the network computed in float: what
        the rest makes of an error counts, not only its size. (GLF-Q, 2026, adds the features before the head alike.)
        """
        values = dict(self.entries[chunk])
        run_segment(self.graph, self.segment, values, compute)
        near = summed_error(tensors_of(self.segment.exits, values), self.target(chunk), self.weights)
        if not (self.foresight and self.rest.nodes):
            return near
        run_segment(self.graph, self.rest, values, in_float)
        return near + self.foresight * summed_error(tensors_of(self.graph.outputs, values), self.answers[chunk])

    def error(self, decided: Quantization, chunks: Iterable[int]) -> float:
        """Return the mean loss of a decision over the samples of chunks."""
        simulation = Simulation(decided)
        losses, counts = list[float](), list[int]()
        for chunk in chunks:
            with torch.no_grad():
                losses.append(float(self.loss(chunk, simulation)))
            counts.append(len(self.numbers[chunk]))
            give_back_memory()
        return sum(loss * count for loss, count in zip(losses, counts, strict=True)) / sum(counts)


def tensors_of(nodes: Iterable[fx.Node], values: Values) -> list[Tensor]:
    """Return the floating-point values of nodes (sizes and masks are not learned)."""
    found = (values[node] for node in nodes)
    return [value for value in found if isinstance(value, Tensor) and value.is_floating_point()]


def floating(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Return the floating-point tensors among outputs (masks and indices have no error)."""
    return [tensor for tensor in tensors if tensor.is_floating_point()]


def forget(values: Values, later: Collection[fx.Node]) -> None:
    """Let go of the values that nobody reads later."""
    for node in [node for node in values if node not in later]:
        del values[node]


def summed_error(found: Sequence[Tensor], wanted: Sequence[Tensor], weights: Sequence[Tensor] | None = None) -> Tensor:
    """Return the sum of the tensors' relative errors; 0 of no tensors."""
    if not wanted:
        return torch.zeros(())
    counts: Sequence[Tensor | float] = [1.0] * len(wanted) if weights is None else weights
    return torch.stack([relative_error(*each) for each in zip(found, wanted, counts, strict=True)]).sum()


def relative_error(found: Tensor, wanted: Tensor, weight: Tensor | float = 1.0) -> Tensor:
    """Return ``sum weight (found - wanted)^2 / sum weight wanted^2``.

    Where both are the same infinity, as in attention masks, there is no error.
    """
    error = torch.where(found == wanted, 0.0, found - wanted).square()
    size = (weight * wanted.masked_fill(wanted.isinf(), 0.0).square()).sum()
    return (weight * error).sum() / size.clamp(min=torch.finfo(wanted.dtype).tiny)
