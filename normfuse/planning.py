"""Decides what every activation and every weight of a folded graph gets, before any quantizer is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, Final

from torch import Tensor

from normfuse.calibration import Ranges, calibrate
from normfuse.checkpoint import Checkpoint, calibration_key
from normfuse.feeding import Stream, fixed_batch
from normfuse.graph import Graph
from normfuse.graph.quantization import requests
from normfuse.heap import give_back_memory
from normfuse.passes.equalize_channels import EqualizeChannels
from normfuse.passes.insert_quantizers import InsertQuantizers
from normfuse.passes.place_quantizers import PlaceQuantizers
from normfuse.passes.presets import LOWER
from normfuse.passes.quantize_tables import QuantizeTables
from normfuse.pipeline import Fact, Phase, Pipeline
from normfuse.precision import (
    BlockReport,
    Quantization,
    choose_equalizations,
    chunk_size,
    chunked,
    refine_blockwise,
    refinements,
    refinements_at_once,
    round_all_to_nearest,
)
from normfuse.precision.assignment import PlacementOf, assigned
from normfuse.precision.put_back import Decided
from normfuse.progress import Progress
from normfuse.quant.placement import Placement
from normfuse.recipe import Recipe
from normfuse.report import PassReport
from normfuse.rotating import rotated_if_better
from normfuse.sensitivity.units import bits_by_map, members_of, overridden
from normfuse.target_bits import has_few_by_layer, members_of_target

__all__ = ["Placed", "Plan", "place", "plan_quantization", "refined"]

FORESIGHT: Final = 1.0
"""The weight of the error at the network's outputs beside that at a block's."""

CHOOSING_SAMPLES: Final = 64
"""How many samples choose rotations, and scales and shifts of channels, a quarter of them held out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Placed:
    """A float graph with requests, and what each pass did on the way."""

    graph: Graph
    passes: tuple[PassReport, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What was decided for a folded graph, and how it came to be.

    ``notes`` say what was gone on with, ``mixed`` how every layer got its own bits, for the report; empty if none did.
    """

    decided: Decided
    passes: tuple[PassReport, ...]
    ranges: Ranges
    blocks: tuple[BlockReport, ...]
    notes: tuple[str, ...] = ()
    mixed: Mapping[str, Any] = field(default_factory=dict)

    @property
    def graph(self) -> Graph:
        """The float graph with requests."""
        return self.decided.graph

    def changed(self, decided: Decided) -> Plan:
        """Return the plan with another decision."""
        return replace(self, decided=decided)

    def simulated(self, *, biases_stay_float: bool = False) -> tuple[Graph, PassReport]:
        """Return a graph with the quantizers: running it is the simulation; and what could not be quantized."""
        graph, chosen = self.graph.copy(), self.decided.quantization
        quantizers = InsertQuantizers(
            activations=chosen.activations, weights=chosen.weights, biases_stay_float=biases_stay_float
        )
        insert = Phase("precision", (quantizers,))
        (report,) = Pipeline(phases=(insert,), given=frozenset({Fact.PLACED})).run(graph)
        return graph, report


def plan_quantization(  # noqa: PLR0913 - what a plan needs; a bundle of them would be read nowhere else
    folded: Graph,
    samples: Stream,
    *,
    recipe: Recipe,
    placement: Placement,
    total: int,
    progress: Progress,
    placement_of: PlacementOf | None = None,
    resume: Path | None = None,
) -> Plan:
    """Decide the parameters of every activation and the codes of every weight of a folded float graph.

    Args:
        folded: the float graph; it is not changed.
        samples: calibration samples.
        recipe: bits, effort, calibration method and seed.
        placement: what the target wants quantized.
        total: the number of samples, for the progress bar.
        progress: shows what takes long.
        placement_of: the same for the bits that the recipe's overrides give; not needed without.
        resume: a folder that holds what is finished, for a run that is killed and started again (``Checkpoint``).
    """
    checkpoint = None if resume is None else _checkpoint(resume, folded, samples, recipe, placement, progress)
    placed = place(folded, samples, recipe=recipe, placement=placement, progress=progress)
    graph = placed.graph
    if recipe.overrides or has_few_by_layer(recipe):
        assert placement_of is not None
        graph = _with_own_bits(graph, next(iter(samples())), recipe, placement_of)
    found = _ranges(graph, samples, recipe, total, checkpoint, progress)
    ranges = found.by_name
    with progress.task("quantizing"):
        nearest = round_all_to_nearest(graph, ranges)
    give_back_memory()
    chosen, blocks = refined(graph, samples, nearest, recipe, placement, checkpoint, progress)
    return Plan(
        decided=Decided(graph=graph, ranges=ranges, quantization=chosen),
        passes=placed.passes,
        ranges=found,
        blocks=tuple(blocks),
        notes=tuple(checkpoint.notes) if checkpoint else (),
    )


def place(folded: Graph, samples: Stream, *, recipe: Recipe, placement: Placement, progress: Progress) -> Placed:
    """Return a copy of a folded graph, rotated and equalized if the recipe wants it, with the target's requests."""
    graph = folded.copy()
    give_back_memory()  # folding computes in float64
    tables = () if placement.table is None else (QuantizeTables(type=placement.table),)
    phase = Phase("precision", (*tables, PlaceQuantizers(placement=placement)))
    reports = list[PassReport]()
    if recipe.rotate:
        graph, reports = rotated_if_better(
            graph, phase, _some_chunks(graph, samples), seed=recipe.seed, progress=progress
        )
    reports += _equalize(graph, samples, phase, progress) if recipe.equalize else []
    reports += Pipeline(phases=(phase,), given=frozenset({Fact.FOLDED})).run(graph)
    return Placed(graph=graph, passes=tuple(reports))


def _with_own_bits(graph: Graph, sample: Sequence[Tensor], recipe: Recipe, placement_of: PlacementOf) -> Graph:
    """Return the graph in which the layers that the user named have the bits that he gave them.

    Where the target has few bits for some layers alone, a graph of eight becomes one of few where it has them.
    """
    members = overridden(members_of(graph, sample), recipe.chosen_overrides)
    members = members_of_target(members, graph, recipe, placement_of)
    given = [member for member in members if has_few_by_layer(recipe) or member.override is not None]
    chosen = {member.name: member.allowed(recipe.precision) for member in given}
    return assigned(graph, bits_by_map(given, chosen), placement_of)


def _equalize(graph: Graph, samples: Stream, phase: Phase, progress: Progress) -> list[PassReport]:
    """Make the channels of what will be quantized alike where that helps; some samples are enough to tell."""
    placed = graph.copy()
    Pipeline(phases=(phase,), given=frozenset({Fact.FOLDED})).run(placed)
    chosen = choose_equalizations(graph, placed, _some_chunks(graph, samples), progress=progress)
    equalization = Phase("equalization", (EqualizeChannels(chosen=chosen), *LOWER.passes))
    return Pipeline(phases=(equalization,), given=frozenset({Fact.FOLDED})).run(graph)


def _some_chunks(graph: Graph, samples: Stream) -> list[tuple[Tensor, ...]]:
    """Return the first samples, as many as choices of the graph's form need, in chunks."""
    return chunked(islice(samples(), CHOOSING_SAMPLES // (fixed_batch(graph) or 1)), chunk_size(graph))


def _ranges(
    graph: Graph, samples: Stream, recipe: Recipe, total: int, checkpoint: Checkpoint | None, progress: Progress
) -> Ranges:
    if all(request.group is not None for request in requests(graph)):
        return Ranges({}, 0)
    batch = fixed_batch(graph) or 1
    known = None if checkpoint is None else checkpoint.ranges()
    found = known or calibrate(graph, samples, method=recipe.calibration, total=total // batch, progress=progress)
    if checkpoint is not None and known is None:
        checkpoint.keep_ranges(found)
    return replace(found, samples=found.samples * batch)  # it counts what it is fed


def refined(  # noqa: PLR0913, PLR0917 - one step of the plan
    graph: Graph,
    samples: Stream,
    nearest: Quantization,
    recipe: Recipe,
    placement: Placement,
    checkpoint: Checkpoint | None,
    progress: Progress,
) -> tuple[Quantization, list[BlockReport]]:
    """Return the decision after what the recipe's effort tries, and what became of every block."""
    levers = recipe.chosen_levers
    tried = refinements(levers, seed=recipe.seed, placement=placement)
    at_once = refinements_at_once(levers, seed=recipe.seed)
    if not (tried or at_once):
        return nearest, []
    numbers = list[list[int]]()
    # The chunks have no name here: the first block is the last that needs them.
    return refine_blockwise(
        graph,
        chunked(samples(), chunk_size(graph), numbers=numbers),
        nearest,
        tried,
        numbers=numbers,
        at_once=at_once,
        foresight=FORESIGHT if levers.foresight else 0.0,
        curvature=levers.curvature,
        progress=progress,
        keeper=checkpoint,
    )


def _checkpoint(
    folder: Path, folded: Graph, samples: Stream, recipe: Recipe, placement: Placement, progress: Progress
) -> Checkpoint:
    choices = {
        "bits": recipe.bits,
        "levers": recipe.chosen_levers,
        "overrides": recipe.overrides,
        "calibration": recipe.calibration.value,
        "seed": recipe.seed,
        "rotate": recipe.rotate,
        "equalize": recipe.equalize,
        "placement": placement,
    }
    with progress.task("looking for a calibration to go on with"):
        return Checkpoint(folder, calibration_key(folded, samples, choices))
