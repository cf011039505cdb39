"""Bits by several scores; the network says itself which of them it bears best."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from math import inf, isfinite
from types import MappingProxyType
from typing import Final

import torch
from torch import Tensor

from normfuse.graph import Graph
from normfuse.precision.assignment import assigned
from normfuse.precision.block import floating
from normfuse.precision.chunks import samples_in
from normfuse.precision.decision import Quantization, round_all_to_nearest
from normfuse.precision.simulation import Simulation, in_float
from normfuse.progress import Progress
from normfuse.quant.allocation import Allocation, BudgetTooSmall, allocate
from normfuse.quant.bits import Bits
from normfuse.sensitivity.output_loss import OutputLoss
from normfuse.sensitivity.sensitivity import Sensitivity
from normfuse.sensitivity.subject import Subject
from normfuse.sensitivity.units import Member, UseOf, bits_by_map, units, use_of

__all__ = ["Choice", "Decide", "choose", "outputs_lose", "rounded"]

UNIFORM: Final = "uniform"
"""What reports call the same bits for all, where they compete with scores."""

Decide = Callable[[Mapping[str, Bits]], tuple[Graph, Quantization]]
"""From bits by the name of the linear map to the graph with those requests, and what is decided for it."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Choice:
    """Bits by the name of the linear map, and the network that they make.

    Attributes:
        method: the score that they are the optimum of; ``uniform`` for the same bits everywhere.
        bits: by the name of the linear map.
        allocation: by the name of the member.
        graph: with requests of these bits.
        decided: parameters and codes.
        loss: of the outputs, on samples that were not scored; not measured where there was one candidate.
    """

    method: str
    bits: Mapping[str, Bits]
    allocation: Allocation
    graph: Graph
    decided: Quantization
    loss: float | None


def choose(  # noqa: PLR0913 - what is chosen for, from what, within what, and who judges
    members: Sequence[Member],
    scores: Sequence[Sensitivity],
    choices: Sequence[Bits],
    limits: Mapping[str, float],
    *,
    use: UseOf = use_of,
    rest: Mapping[str, float] = MappingProxyType({}),
    decide: Decide,
    judging: Sequence[Sequence[Tensor]],
    loss: OutputLoss,
    progress: Progress,
) -> list[Choice]:
    """Return the choice of every score, the one whose outputs lose least first (ours).

    Each is the optimum of its own score under the limits. Scores add up the damage of single parts as if they did not
    meet; which sum is nearest to the truth is measured on networks as they would ship. Where several scores compete,
    the same bits for all do, too (the widest within the limits): mixed ones have to be better. Equal bits are decided
    once.

    Args:
        members: what gets bits.
        scores: one or more.
        choices: bits that members can have.
        limits: of resources, by name.
        use: what a member uses of them.
        rest: what is used whatever the bits.
        decide: makes the network of some bits.
        judging: chunks of samples, best others than were scored.
        loss: how outputs are compared.
        progress: shows the candidates.

    Raises:
        BudgetTooSmall: no bits keep the limits.
    """
    allocations = {
        score.method: allocate(units(members, score, choices, use=use, rest=rest), limits) for score in scores
    }
    if len(scores) > 1 and (plain := _uniform(members, scores[0], choices, limits, use=use, rest=rest)) is not None:
        allocations[UNIFORM] = plain
    bits = {method: bits_by_map(members, found.bits) for method, found in allocations.items()}
    candidates = {tuple(each.values()): each for each in bits.values()}
    found = dict[tuple[Bits, ...], tuple[Graph, Quantization, float | None]]()
    with progress.task("comparing allocations", len(candidates)) as advance:
        for key, each in candidates.items():
            graph, decided = decide(each)
            found[key] = (graph, decided, outputs_lose(graph, decided, judging, loss) if len(candidates) > 1 else None)
            advance(1)
    made = []
    for method, each in bits.items():
        graph, decided, lost = found[tuple(each.values())]
        allocation = allocations[method]
        made.append(Choice(method=method, bits=each, allocation=allocation, graph=graph, decided=decided, loss=lost))
    return sorted(made, key=_badness)


def _uniform(
    members: Sequence[Member],
    score: Sensitivity,
    choices: Sequence[Bits],
    limits: Mapping[str, float],
    *,
    use: UseOf,
    rest: Mapping[str, float],
) -> Allocation | None:
    """Return the widest bits that all members can have at once, those of least damage; None where none keep the limits.

    Members whose bits are given keep them.
    """
    found = list[Allocation]()
    for bits in choices:
        with suppress(BudgetTooSmall):
            found.append(allocate(units(members, score, [bits], use=use, rest=rest), limits))
    return min(found, key=lambda each: each.damage, default=None)


def _badness(choice: Choice) -> float:
    """Return what is lost; what is not a number is worst."""
    if choice.loss is None:
        return 0.0
    return choice.loss if isfinite(choice.loss) else inf


def rounded(subject: Subject, bits: Mapping[str, Bits]) -> tuple[Graph, Quantization]:
    """Return the graph with requests of these bits, and the decision that rounds every part of it to nearest."""
    graph = assigned(subject.graph, bits, subject.placement_of)
    return graph, round_all_to_nearest(graph, subject.ranges_of(graph).by_name)


@torch.no_grad()
def outputs_lose(graph: Graph, decided: Quantization, chunks: Sequence[Sequence[Tensor]], loss: OutputLoss) -> float:
    """Return the loss of the outputs of a quantized network, the mean over samples."""
    simulation, total = Simulation(decided), 0.0
    for chunk in chunks:
        found, wanted = (floating(graph.run_as(chunk, compute)) for compute in (simulation, in_float))
        total += float(loss.per_sample(found, wanted).sum())
    return total / sum(samples_in(chunk) for chunk in chunks)
