"""Goes through a network block by block; each learns against the float network, behind what was decided before it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor, fx

from normfuse.errors import BadInput
from normfuse.graph import Graph, query
from normfuse.graph.quantization import requested_weights
from normfuse.graph.segments import Compute, Segment, plainly, run_segment, segments
from normfuse.precision.block import Block, Values, tensors_of
from normfuse.precision.decision import Quantization
from normfuse.precision.simulation import Simulation
from normfuse.progress import Progress, Silent

__all__ = ["BlockReport", "Refinement", "refine_blockwise"]

HELD_OUT: Final = 8
"""One of so many chunks judges what the others taught."""

Refinement = Callable[[Block, Quantization], Quantization]
"""From a block and the decision so far to a better one, if it succeeds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockReport:
    """What became of one block: its relative output error at first and after each refinement that was kept."""

    exits: tuple[str, ...]
    before: float
    kept: Mapping[str, float] = field(default_factory=dict)
    reverted: Mapping[str, float] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Return the block for JSON."""
        return {
            "block": ", ".join(self.exits),
            "before": self.before,
            "kept": dict(self.kept),
            "reverted": dict(self.reverted),
        }


def refine_blockwise(
    graph: Graph,
    chunks: Sequence[Sequence[Tensor]],
    decided: Quantization,
    refinements: Mapping[str, Refinement],
    *,
    progress: Progress | None = None,
) -> tuple[Quantization, list[BlockReport]]:
    """Return the decision after every refinement was tried on every block, and what it did.

    A refinement is kept where it lowers the block's output error on chunks that it has not learned from.

    Args:
        graph: a float graph with requests.
        chunks: batches of samples, one tensor per input; two tensors per chunk and boundary are held at a time.
        decided: the decision to start from.
        refinements: by name, in the order they are tried.
        progress: shows the blocks.

    Raises:
        BadInput: there are no chunks, or NaN comes out of a block.
    """
    if not chunks:
        raise BadInput("there are no calibration samples", expected="at least one sample")
    maps, reports = requested_weights(graph), list[BlockReport]()
    parts = segments(graph, wanted=lambda node: node in maps)
    exact = [_inputs(graph, chunk) for chunk in chunks]
    quantized = [dict(values) for values in exact]
    with (progress or Silent()).task("refining blocks", len(parts)) as advance, torch.no_grad():
        for index, segment in enumerate(parts):
            later = {node for part in parts[index + 1 :] for node in part.entries} | set(graph.outputs)
            before = [dict(values) for values in exact]
            _advance(graph, segment, exact, plainly, set())
            _refuse_nan(segment, exact)
            block = Block(
                graph=graph,
                segment=segment,
                entries=quantized,
                exact=before,
                targets=[tensors_of(segment, values) for values in exact],
                held_out=max(len(chunks) // HELD_OUT, 1),
            )
            if any(node in maps for node in segment.nodes):
                decided, report = _refine(block, decided, refinements)
                reports.append(report)
            _advance(graph, segment, quantized, Simulation(decided), later)
            for values in exact:
                _forget(values, later)
            advance(1)
    return decided, reports


def _refine(
    block: Block, decided: Quantization, refinements: Mapping[str, Refinement]
) -> tuple[Quantization, BlockReport]:
    before = error = block.error(decided, block.judging)
    kept, reverted = dict[str, float](), dict[str, float]()
    for name, refine in refinements.items():
        with torch.enable_grad():
            trial = refine(block, decided)
        found = block.error(trial, block.judging)
        if found < error:
            decided, error, kept[name] = trial, found, found
        else:
            reverted[name] = found
    names = tuple(node.name for node in block.segment.exits)
    return decided, BlockReport(exits=names, before=before, kept=kept, reverted=reverted)


def _inputs(graph: Graph, chunk: Sequence[Tensor]) -> Values:
    return dict(zip(graph.inputs, chunk, strict=True))


def _advance(graph: Graph, segment: Segment, chunks: Sequence[Values], compute: Compute, later: set[fx.Node]) -> None:
    for values in chunks:
        run_segment(graph, segment, values, compute)
        if later:
            _forget(values, later)


def _refuse_nan(segment: Segment, chunks: Sequence[Values]) -> None:
    """Refuse what nothing can be learned from. (Infinity is left alone: attention masks hold it.)"""
    for index, values in enumerate(chunks):
        for node in segment.exits:
            if isinstance(values[node], Tensor) and bool(values[node].isnan().any()):
                raise BadInput(
                    "an activation is not finite",
                    where=f"{query.layer_of(node) or node.name}, calibration chunk {index} of {len(chunks)}",
                    expected="finite values everywhere",
                    hint="check the model on these samples, or leave them out",
                )


def _forget(values: dict[fx.Node, Any], later: set[fx.Node]) -> None:
    for node in [node for node in values if node not in later]:
        del values[node]
