"""Gives every layer its own bits: scores them, and solves for the least damage within a budget."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import ceil, inf
from pathlib import Path

from torch import Tensor

from normfuse.bench.timing import EngineSpec
from normfuse.built import Workspace
from normfuse.checkpoint import Checkpoint, calibration_key
from normfuse.count_resources import count_resources, refuse_impossible
from normfuse.feeding import Stream
from normfuse.graph import Graph
from normfuse.mixed_report import mixed_report
from normfuse.planning import Placed, Plan, refined
from normfuse.precision import BlockReport, Quantization
from normfuse.precision.assignment import PlacementOf
from normfuse.precision.put_back import Decided
from normfuse.prepare_subject import prepare_subject
from normfuse.progress import Progress
from normfuse.quant.allocation import front
from normfuse.quant.bits import Bits
from normfuse.quant.budget import Limit, Resource
from normfuse.quant.knapsack import SLACK
from normfuse.quant.placement import Placement
from normfuse.recipe import Recipe
from normfuse.sensitivity.choosing import Choice, choose, rounded
from normfuse.sensitivity.keeping import FORGETFUL
from normfuse.sensitivity.methods import scores_of
from normfuse.sensitivity.refreshing import refreshed
from normfuse.sensitivity.resources import Resources
from normfuse.sensitivity.sensitivity import Sensitivity
from normfuse.sensitivity.subject import Subject
from normfuse.sensitivity.units import Member, units
from normfuse.target_bits import bits_of_target

__all__ = ["Mixing", "prepare_mixing"]

Key = tuple[Bits, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class Mixing:
    """A network that is ready to get its bits.

    Attributes:
        recipe: the user's choices.
        samples: for what an effort learns from.
        placed: the graph with requests of the target's widest codes.
        subject: what was scored.
        judging: chunks of other samples.
        members: what gets bits.
        scores: what fewer bits of each are expected to cost, one table per score.
        resources: what bits use.
        placement_of: the target.
        progress: shows what takes long.
        checkpoint: what an earlier run has finished.
    """

    recipe: Recipe
    samples: Stream
    placed: Placed
    subject: Subject
    judging: Sequence[Sequence[Tensor]]
    members: Sequence[Member]
    scores: Sequence[Sensitivity]
    resources: Resources
    placement_of: PlacementOf
    progress: Progress
    checkpoint: Checkpoint | None = None
    _decided: dict[Key, tuple[Graph, Quantization, list[BlockReport]]] = field(default_factory=dict)

    @cached_property
    def choices(self) -> tuple[Bits, ...]:
        """The bits that layers may have."""
        return bits_of_target(self.recipe)

    def plan(self, limits: Sequence[Limit]) -> Plan:
        """Return the plan with the bits of least damage within limits (but that of the drop, which is measured).

        Raises:
            BudgetTooSmall: no bits keep the limits.
        """
        bounds, scores = self.resources.bounds(limits), list(self.scores)
        found = self._chosen(scores, bounds)
        for number in range(1, self.recipe.refresh + 1):
            name = f"refresh {number}"
            scores.append(refreshed(self.subject, found[0].decided, name=name, progress=self.progress))
            found = self._chosen(scores, bounds)
        score = next((each for each in scores if each.method == found[0].method), scores[0])
        return self._plan(found, score, bounds, " ".join(str(limit) for limit in limits))

    def _chosen(self, scores: Sequence[Sensitivity], bounds: Mapping[str, float]) -> list[Choice]:
        return choose(
            self.members,
            scores,
            self.choices,
            bounds,
            use=self.resources.use,
            rest=self.resources.rest,
            decide=self._decide,
            judging=self.judging,
            loss=self.subject.loss,
            progress=self.progress,
        )

    def front(self, limits: Sequence[Limit], *, points: int) -> list[Limit]:
        """Return the average bits per weight of the Pareto front within limits, fewest first."""
        whole = units(self.members, self.scores[0], self.choices, use=self.resources.use, rest=self.resources.rest)
        name, bounds = Resource.AVERAGE_BITS.value, self.resources.bounds(limits)
        found = front(whole, name, bounds, points=points)
        # Written with few digits, and rounded up, so that the user can ask for a point again.
        short = (ceil(each.use[name] / (1 + SLACK) * 1000) / 1000 for each in found)
        return list(dict.fromkeys(Limit(Resource.AVERAGE_BITS, min(each, bounds.get(name, inf))) for each in short))

    def _decide(self, bits: Mapping[str, Bits]) -> tuple[Graph, Quantization]:
        key = tuple(bits.values())
        if key not in self._decided:
            graph, nearest = rounded(self.subject, bits)
            placement, kept = self.placement_of(self.recipe.precision), None
            if self.checkpoint is not None:
                kept = _of_bits(self.checkpoint, bits)
            decided, blocks = refined(graph, self.samples, nearest, self.recipe, placement, kept, self.progress)
            self._decided[key] = (graph, decided, blocks)
        graph, decided, _ = self._decided[key]
        return graph, decided

    def _plan(self, found: Sequence[Choice], score: Sensitivity, bounds: Mapping[str, float], budget: str) -> Plan:
        best = found[0]
        report = mixed_report(self.members, found, score, self.resources, bounds)
        graph, decided, blocks = self._decided[tuple(best.bits.values())]
        ranges = self.subject.ranges_of(graph)
        return Plan(
            decided=Decided(graph=graph, ranges=ranges.by_name, quantization=decided),
            passes=self.placed.passes,
            ranges=ranges,
            blocks=tuple(blocks),
            notes=tuple(self.checkpoint.notes) if self.checkpoint else (),
            mixed={"budget": budget, "asked": self.recipe.budget, **report},
        )


def _of_bits(checkpoint: Checkpoint, bits: Mapping[str, Bits]) -> Checkpoint:
    """Return where the finished blocks of a network of these bits are kept."""
    written = " ".join(f"{name}={each}" for name, each in bits.items())
    digest = hashlib.sha256(written.encode()).hexdigest()[:16]
    return checkpoint.inner(digest, {**checkpoint.key, "bits": written})


def prepare_mixing(  # noqa: PLR0913 - what mixed bits follow from
    folded: Graph,
    samples: Stream,
    *,
    recipe: Recipe,
    placement_of: PlacementOf,
    floating: EngineSpec,
    folder: Workspace,
    threads: int,
    progress: Progress,
    resume: Path | None = None,
) -> Mixing:
    """Score a folded graph and count what its layers use.

    Args:
        folded: the float graph; it is not changed.
        samples: calibration samples.
        recipe: with mixed bits.
        placement_of: the target.
        floating: the float engine, which relative budgets are parts of.
        folder: for engines that are measured.
        threads: to measure with.
        progress: shows what takes long.
        resume: a folder that holds what is finished (``Checkpoint``).

    Raises:
        UsageError: the recipe's scores or overrides do not fit the model.
    """
    ready = prepare_subject(folded, samples, recipe=recipe, placement_of=placement_of, progress=progress)
    subject, members, placed = ready.subject, ready.members, ready.placed
    resources = count_resources(ready, recipe, floating, folder, threads, progress)
    refuse_impossible(members, resources, recipe)
    checkpoint = None
    if resume is not None:
        placement = placement_of(recipe.precision)
        checkpoint = mixed_checkpoint(resume, folded, samples, recipe=recipe, placement=placement, progress=progress)
    scores = scores_of(
        subject, recipe.chosen_scores, seed=recipe.seed, progress=progress, keeper=checkpoint or FORGETFUL
    )
    return Mixing(
        recipe=recipe,
        samples=samples,
        placed=placed,
        subject=subject,
        judging=ready.judging,
        members=members,
        scores=scores,
        resources=resources,
        placement_of=placement_of,
        progress=progress,
        checkpoint=checkpoint,
    )


def mixed_checkpoint(
    folder: Path, folded: Graph, samples: Stream, *, recipe: Recipe, placement: Placement, progress: Progress
) -> Checkpoint:
    """Return what is kept of a recipe with mixed bits: its budget may be another one, scores do not follow from it."""
    names = (
        "effort",
        "levers",
        "calibration",
        "seed",
        "rotate",
        "equalize",
        "overrides",
        "weights",
        "table_bits",
        "outputs",
    )
    choices = {
        "widths": recipe.widths,
        "placement": placement,
        **{name: getattr(recipe, name) for name in names},
    }
    with progress.task("looking for a calibration to go on with"):
        return Checkpoint(folder, calibration_key(folded, samples, choices))
