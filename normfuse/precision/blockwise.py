"""Goes through a network block by block; each learns against the float network, behind what was decided before it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from types import MappingProxyType
from typing import Any, Final, Protocol

import torch
from torch import Tensor, fx

from normfuse.errors import BadInput
from normfuse.graph import Graph
from normfuse.graph.quantization import requested_weights
from normfuse.graph.quickly import quickly
from normfuse.graph.segments import Compute, Segment, joined, read_after, run_segment, segments, with_floats
from normfuse.heap import give_back_memory
from normfuse.precision.block import Block, Values, floating, forget
from normfuse.precision.chunks import samples_in, split
from normfuse.precision.curvature import exit_weights
from normfuse.precision.decision import Quantization
from normfuse.precision.simulation import Simulation
from normfuse.precision.whereabouts import not_finite
from normfuse.progress import Progress, Silent

__all__ = ["BlockReport", "Keeper", "Refinement", "refine_blockwise"]

HELD_OUT: Final = 8
"""One of so many samples judges what the others taught."""

Refinement = Callable[[Block, Quantization], Quantization]
"""From a block and the decision so far to a better one, if it succeeds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockReport:
    """What became of one block: its loss (see ``Block.loss``) at first and after each refinement that was kept."""

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


class Keeper(Protocol):
    """Something that remembers finished blocks by their number."""

    def block(self, index: int) -> tuple[Quantization, BlockReport] | None:
        """Return what a block has changed of the decision, if it was finished."""
        ...

    def keep_block(self, index: int, decided: Quantization, report: BlockReport) -> None:
        """Remember what a block has changed of the decision."""
        ...


def refine_blockwise(  # noqa: PLR0913 - a graph, its data, a decision and how to better it
    graph: Graph,
    chunks: Sequence[Sequence[Tensor]],
    decided: Quantization,
    refinements: Mapping[str, Refinement],
    *,
    at_once: Mapping[str, Refinement] = MappingProxyType({}),
    numbers: Sequence[Sequence[int]] | None = None,
    foresight: float = 0.0,
    curvature: bool = False,
    progress: Progress | None = None,
    keeper: Keeper | None = None,
) -> tuple[Quantization, list[BlockReport]]:
    """Return the decision after every refinement was tried on every block, and what it did.

    A refinement is kept where it lowers the block's loss on chunks that it has not learned from.

    Args:
        graph: a float graph with requests.
        chunks: batches of samples, one tensor per input; two tensors per chunk and boundary are held at a time, and
            a third of those chunks whose targets a refinement asks for.
        decided: the decision to start from.
        refinements: by name, in the order they are tried.
        at_once: refinements of the whole network as one block, after all others.
        numbers: of every chunk those of its samples, for messages; None where they are in order.
        foresight: the weight of the error at the network's outputs beside that at the block's; with it an update runs
            all of the network behind the block.
        curvature: errors at a block's exits count by what they do to the outputs (``exit_weights``).
        progress: shows the blocks.
        keeper: knows blocks that an earlier run has finished, which are not refined again, and gets those of this one.

    Raises:
        BadInput: there are no chunks, or NaN comes out of a block; the message names layer and sample.
    """
    if not chunks:
        raise BadInput("there are no calibration samples", expected="at least one sample")
    maps, reports = requested_weights(graph), list[BlockReport]()
    numbers = _in_order(chunks) if numbers is None else numbers
    judges = split([len(samples) for samples in numbers], HELD_OUT)
    parts = segments(graph, wanted=lambda node: node in maps)
    exact = [_inputs(graph, chunk) for chunk in chunks]
    quantized = [dict(values) for values in exact]
    inputs = [dict(values) for values in exact] if at_once else []
    with torch.no_grad():
        answers = [floating(graph.run(*chunk)) for chunk in chunks] if foresight or curvature else [[] for _ in chunks]
    block_of = partial(Block, graph=graph, numbers=numbers, answers=answers, split=judges)
    del chunks  # the inputs live as long as a block reads them
    with (progress or Silent()).task("refining blocks", len(parts)) as advance, torch.no_grad():
        for index, segment in enumerate(parts):
            later = read_after(graph, parts[index + 1 :])
            rest = joined(parts[index + 1 :])
            block = block_of(
                segment=with_floats(segment), entries=quantized, exact=exact, rest=rest, foresight=foresight
            )
            if any(node in maps for node in segment.nodes):
                decided, report = _refined(block, index, decided, refinements, keeper, curvature=curvature)
                reports.append(report)
            del block
            for values, samples in zip(exact, numbers, strict=True):
                _advance(graph, segment, values, quickly, later, checked=samples)
            for values in quantized:
                _advance(graph, segment, values, Simulation(decided), later)
            advance(1)
        if at_once:
            whole = with_floats(joined(parts))
            block = block_of(segment=whole, entries=inputs, exact=inputs, rest=joined([]), foresight=0.0)
            decided, report = _refined(block, len(parts), decided, at_once, keeper)
            reports.append(report)
    return decided, reports


def _refined(
    block: Block,
    index: int,
    decided: Quantization,
    refinements: Mapping[str, Refinement],
    keeper: Keeper | None,
    *,
    curvature: bool = False,
) -> tuple[Quantization, BlockReport]:
    """Return the decision after a block was refined, or as an earlier run has left it."""
    if keeper is not None and (done := keeper.block(index)) is not None:
        changes, report = done
        return decided.changed(activations=changes.activations, weights=changes.weights), report
    if curvature and block.rest.nodes:
        block = replace(block, weights=exit_weights(block, decided))
    refined, report = _refine(block, decided, refinements)
    if keeper is not None:
        keeper.keep_block(index, _changed(decided, refined), report)
    return refined, report


def _refine(
    block: Block, decided: Quantization, refinements: Mapping[str, Refinement]
) -> tuple[Quantization, BlockReport]:
    before = error = block.error(decided, block.split.judging)
    kept, reverted = dict[str, float](), dict[str, float]()
    for name, refine in refinements.items():
        with torch.enable_grad():
            trial = refine(block, decided)
        found = block.error(trial, block.split.judging)
        if found < error:
            decided, error, kept[name] = trial, found, found
        else:
            reverted[name] = found
    names = tuple(node.name for node in block.segment.exits)
    return decided, BlockReport(exits=names, before=before, kept=kept, reverted=reverted)


def _changed(before: Quantization, after: Quantization) -> Quantization:
    """Return the part of a decision that is another one than before."""
    return Quantization(
        activations={n: each for n, each in after.activations.items() if each is not before.activations.get(n)},
        weights={n: each for n, each in after.weights.items() if each is not before.weights.get(n)},
    )


def _inputs(graph: Graph, chunk: Sequence[Tensor]) -> Values:
    return dict(zip(graph.inputs, chunk, strict=True))


def _in_order(chunks: Sequence[Sequence[Tensor]]) -> list[list[int]]:
    sizes = [samples_in(chunk) for chunk in chunks]
    return [list(range(sum(sizes[:at]), sum(sizes[: at + 1]))) for at in range(len(sizes))]


def _advance(
    graph: Graph,
    segment: Segment,
    values: Values,
    compute: Compute,
    later: Collection[fx.Node],
    checked: Sequence[int] = (),
) -> None:
    """Put a segment's exits in the place of its entries; NaN in samples with these numbers is refused."""
    run_segment(graph, segment, values, compute)
    if checked:
        _refuse_nan(graph, segment, values, checked)
    forget(values, later)
    give_back_memory()


def _refuse_nan(graph: Graph, segment: Segment, values: Values, samples: Sequence[int]) -> None:
    """Refuse what nothing can be learned from. (Infinity is left alone: attention masks hold it.)"""
    if not any(_has_nan(values[node]) for node in segment.exits):
        return

    def locate(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if _has_nan(value := quickly(node, args, kwargs)):
            raise not_finite(node, value.isnan(), samples)
        return value

    run_segment(graph, segment, dict(values), locate)


def _has_nan(value: Any) -> bool:
    return isinstance(value, Tensor) and bool(value.isnan().any())
