"""Gives every layer its own bits: scores them, counts what they use, and solves for the least damage in a budget."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import islice
from math import ceil, inf
from pathlib import Path
from typing import Final

from torch import Tensor

from normfuse.bench.inputs import write_inputs
from normfuse.bench.timing import EngineSpec, time_engines
from normfuse.build import write_quantized
from normfuse.built import Workspace
from normfuse.checkpoint import Checkpoint, calibration_key
from normfuse.data import Sample, Samples
from normfuse.errors import UsageError
from normfuse.feeding import Stream, fixed_batch
from normfuse.graph import Graph
from normfuse.graph.quantization import requests
from normfuse.latency_table import LatencyTable
from normfuse.layer_latency import measure_layers
from normfuse.measure import file_bytes
from normfuse.mixed_report import mixed_report
from normfuse.planning import Placed, Plan, place, refined
from normfuse.precision import BlockReport, Quantization, chunk_size, chunked
from normfuse.precision.assignment import PlacementOf, wanted_weight
from normfuse.precision.chunks import samples_in
from normfuse.precision.put_back import Decided
from normfuse.precision.workload import steps_of
from normfuse.progress import Progress
from normfuse.quant.allocation import allocate, front
from normfuse.quant.bits import FLOAT, Bits
from normfuse.quant.budget import Limit, Resource
from normfuse.quant.knapsack import SLACK
from normfuse.quant.placement import Placement
from normfuse.recipe import Recipe
from normfuse.rewrite.linear_map import read_linear_map
from normfuse.sensitivity.choosing import Choice, choose, rounded
from normfuse.sensitivity.keeping import FORGETFUL
from normfuse.sensitivity.methods import scores_of
from normfuse.sensitivity.refreshing import refreshed
from normfuse.sensitivity.resources import Resources
from normfuse.sensitivity.sensitivity import Sensitivity
from normfuse.sensitivity.subject import Subject, ranges_by_width
from normfuse.sensitivity.units import UNTOUCHED, Member, bits_by_map, members_of, options, overridden, units

__all__ = ["Mixing", "Prepared", "prepare_mixing", "prepare_subject"]

SCORED: Final = 64
"""Samples at most that are scored, and as many others that candidates are judged on."""

Key = tuple[Bits, ...]

Seconds = Mapping[str, Mapping[Bits, float]]
"""By the name of the linear map and bits."""


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
        return options(*self.recipe.widths)

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
        score = next(each for each in scores if each.method == found[0].method)
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
    resources = _resources(ready, recipe, floating, folder, threads, progress)
    _refuse_impossible(members, resources, recipe)
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


def _resources(
    ready: Prepared,
    recipe: Recipe,
    floating: EngineSpec,
    folder: Workspace,
    threads: int,
    progress: Progress,
) -> Resources:
    """Return what bits use; what takes time to find out only where it is limited."""
    subject, members = ready.subject, ready.members
    sample = [tensor[:1] if tensor.ndim and subject.graph.has_dynamic_batch else tensor for tensor in subject.chunks[0]]
    limited = {limit.resource for limit in recipe.chosen_budget.limits}
    found = Resources(
        parameters=sum(member.parameters for member in members),
        macs=sum(member.macs for member in members),
        float_bytes=file_bytes(floating.path),
    )
    if Resource.BYTES in limited:
        found = replace(found, scales=_scales(ready, recipe))
        found = replace(found, other_bytes=_other_bytes(ready, found, recipe, folder))
    if Resource.ACTIVATION_BYTES in limited:
        chosen = {member.reads for member in members}
        fixed = {each.source.name: each.type.bits for each in requests(subject.graph) if each.source.name not in chosen}
        found = replace(found, steps=steps_of(subject.graph, sample), fixed_bits=fixed)
    if Resource.LATENCY in limited:
        batch = fixed_batch(subject.graph) or recipe.batch
        given = [member.allowed(UNTOUCHED) for member in members if member.override is not None]
        table = measure_layers(
            subject.graph,
            sample,
            list(dict.fromkeys([*options(*recipe.widths), *given, Bits(FLOAT, FLOAT)])),
            placement_of=subject.placement_of,
            threads=threads,
            batch=batch,
            progress=progress,
        )
        _refuse_unmeasured(table)
        inputs = _written(sample, subject.graph.input_names, folder.path / "inputs.npz")
        timings = time_engines([floating], batch=batch, threads=threads, inputs=inputs, progress=progress)
        whole = timings[floating.label].p50 / 1e3
        found = replace(found, seconds=_without_calls(table.seconds, whole), float_seconds=whole)
    return found


def _written(sample: Sequence[Tensor], names: Sequence[str], path: Path) -> Path:
    """Write a sample for engines to run on, so that axes of any size are as long as where layers are measured."""
    count = samples_in(sample)

    def read() -> Iterator[Sample]:
        for at in range(count):
            arrays = {name: (x[at] if x.ndim else x).numpy() for name, x in zip(names, sample, strict=True)}
            yield Sample(arrays, f"sample {at}")

    return write_inputs(path, Samples(source="calibration", names=tuple(names), count=count, read=read), batch=count)


def _without_calls(seconds: Seconds, whole: float) -> Seconds:
    """Return what maps take inside an engine, whose calls of onnxruntime each figure has in it.

    Where the float maps alone take longer than the whole float engine, what is too much is shared among their calls.
    """
    in_maps = sum(row[UNTOUCHED] for row in seconds.values())
    call = max(in_maps - whole, 0.0) / max(len(seconds), 1)
    return {name: {bits: max(each - call, 0.0) for bits, each in row.items()} for name, row in seconds.items()}


def _refuse_impossible(members: Sequence[Member], resources: Resources, recipe: Recipe) -> None:
    """Refuse a budget that no bits keep before anything is scored.

    Raises:
        BudgetTooSmall: it is too small.
    """
    maps = {name: dict.fromkeys(recipe.widths[0], 0.0) for member in members for name in member.maps}
    sources = {member.source: dict.fromkeys(recipe.widths[1], 0.0) for member in members}
    harmless = Sensitivity(method="none", weights=maps, activations=sources)
    whole = units(members, harmless, options(*recipe.widths), use=resources.use, rest=resources.rest)
    allocate(whole, resources.bounds(recipe.chosen_budget.limits))


def _refuse_unmeasured(table: LatencyTable) -> None:
    for name, reasons in table.missing.items():
        for bits, reason in reasons.items():
            raise UsageError(
                f"the latency cannot be limited: {name} was not measured with {bits.spelled}",
                where="recipe",
                expected=f"layers that run alone ({reason})",
                hint="another budget, or widths without it (--weight-widths, --activation-widths)",
            )


def _scales(ready: Prepared, recipe: Recipe) -> dict[str, dict[Bits, int]]:
    """Return how many scales every map has in the file at all its bits: one per output, or per group of inputs."""
    subject, found = ready.subject, dict[str, dict[Bits, int]]()
    members = {name: member for member in ready.members for name in member.maps}
    for node in subject.maps:
        linear = read_linear_map(subject.graph, node)
        assert linear is not None
        inputs = linear.weight[0].numel()
        for each in (UNTOUCHED, *options(*recipe.widths), Bits(subject.weight_widths[0], min(recipe.widths[1]))):
            bits = members[node.name].allowed(each)
            group = None if bits.is_float else wanted_weight(node, subject.placement_of(bits)).group
            per_output = 0 if bits.is_float else 1 if group is None else -(-inputs // group)
            found.setdefault(node.name, {})[bits] = linear.outputs * per_output
    return found


def _other_bytes(ready: Prepared, counted: Resources, recipe: Recipe, folder: Workspace) -> int:
    """Return what of a quantized file is no weight, read off a file with the fewest bits everywhere."""
    subject, members = ready.subject, ready.members
    fewest = Bits(subject.weight_widths[0], min(recipe.widths[1]))
    bits = {member.name: member.allowed(fewest) for member in members}
    graph, decided = rounded(subject, bits_by_map(members, bits))
    ranges = subject.ranges_of(graph)
    whole = Decided(graph=graph, ranges=ranges.by_name, quantization=decided)
    plan = Plan(decided=whole, passes=ready.placed.passes, ranges=ranges, blocks=())
    path = folder.model("probe")
    write_quantized(plan, path, placement=subject.placement_of(recipe.precision))
    weights = sum(counted.use(member, bits[member.name])[Resource.BYTES.value] for member in members)
    return file_bytes(path) - int(weights)
