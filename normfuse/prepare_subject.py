"""From a folded graph to what is scored: requests placed, ranges of every width, samples told apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Final

from torch import Tensor

from normfuse.errors import UsageError
from normfuse.feeding import Stream, fixed_batch
from normfuse.graph import Graph
from normfuse.planning import Placed, place
from normfuse.precision import chunk_size, chunked
from normfuse.precision.assignment import PlacementOf
from normfuse.progress import Progress
from normfuse.quant.bits import FLOAT
from normfuse.recipe import Recipe
from normfuse.sensitivity.subject import Subject, ranges_by_width
from normfuse.sensitivity.units import Member, members_of, overridden
from normfuse.target_bits import members_of_target

__all__ = ["Prepared", "prepare_subject"]

SCORED: Final = 64
"""Samples at most that are scored, and as many others that candidates are judged on."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Prepared:
    """A placed graph, what of it is scored, chunks of other samples, and what gets bits."""

    placed: Placed
    subject: Subject
    judging: Sequence[Sequence[Tensor]]
    members: Sequence[Member]


def prepare_subject(
    folded: Graph, samples: Stream, *, recipe: Recipe, placement_of: PlacementOf, progress: Progress
) -> Prepared:
    """Place a folded graph's requests and find the ranges of every width; see ``prepare_mixing``."""
    placed = place(folded, samples, recipe=recipe, placement=placement_of(recipe.precision), progress=progress)
    weights, activations = (tuple(width for width in each if width != FLOAT) for each in recipe.widths)
    scored, judging = _halves(placed.graph, samples)
    members = overridden(members_of(placed.graph, scored[0]), recipe.chosen_overrides)
    members = members_of_target(members, placed.graph, recipe, placement_of)
    given = {each.override.activation for each in members if each.override is not None}
    ranges = ranges_by_width(
        placed.graph,
        samples,
        placement_of=placement_of,
        widths=[*activations, *given],
        method=recipe.calibration,
        progress=progress,
    )
    subject = Subject(
        graph=placed.graph,
        chunks=chunked(scored, chunk_size(placed.graph)),
        placement_of=placement_of,
        weight_widths=weights,
        activation_widths=activations,
        ranges=ranges,
        outputs=recipe.outputs,
    )
    if not subject.maps:
        raise UsageError("no layer of the model can get bits", where="the model", expected="linear maps with weights")
    return Prepared(placed=placed, subject=subject, judging=chunked(judging, chunk_size(placed.graph)), members=members)


def _halves(graph: Graph, samples: Stream) -> tuple[list[Sequence[Tensor]], list[Sequence[Tensor]]]:
    """Return the samples that are scored and those that judge: the same one if there is but one."""
    found = list(islice(samples(), max(2 * SCORED // (fixed_batch(graph) or 1), 1)))
    half = -(-len(found) // 2)
    return found[:half], found[half:] or found
