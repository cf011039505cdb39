"""What the layers of a network use of a budget at all their bits; measured only where it is limited."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from normfuse.bench.inputs import write_inputs
from normfuse.bench.timing import EngineSpec, time_engines
from normfuse.build import write_quantized
from normfuse.built import Workspace
from normfuse.data import Sample, Samples
from normfuse.errors import UsageError
from normfuse.export.body import write_body
from normfuse.feeding import fixed_batch
from normfuse.graph.quantization import requests
from normfuse.latency_table import LatencyTable
from normfuse.layer_latency import measure_layers
from normfuse.measure import file_bytes
from normfuse.planning import Plan
from normfuse.precision.assignment import wanted_weight
from normfuse.precision.chunks import samples_in
from normfuse.precision.put_back import Decided
from normfuse.precision.workload import steps_of
from normfuse.prepare_subject import Prepared
from normfuse.progress import Progress
from normfuse.quant.allocation import allocate
from normfuse.quant.bits import FLOAT, Bits
from normfuse.quant.budget import Resource
from normfuse.quant.target import BodyType
from normfuse.recipe import Recipe
from normfuse.rewrite.linear_map import read_linear_map
from normfuse.sensitivity.choosing import rounded
from normfuse.sensitivity.resources import Resources
from normfuse.sensitivity.sensitivity import Sensitivity
from normfuse.sensitivity.units import UNTOUCHED, Member, bits_by_map, units
from normfuse.target_bits import bits_of_target, fewest_of_target

__all__ = ["count_resources", "refuse_impossible"]

Seconds = Mapping[str, Mapping[Bits, float]]
"""By the name of the linear map and bits."""


def count_resources(
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
        float_bits=FLOAT if recipe.chosen_body is BodyType.FP32 else FLOAT // 2,
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
            list(dict.fromkeys([*bits_of_target(recipe), *given, Bits(FLOAT, FLOAT)])),
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


def refuse_impossible(members: Sequence[Member], resources: Resources, recipe: Recipe) -> None:
    """Refuse a budget that no bits keep before anything is scored.

    Raises:
        BudgetTooSmall: it is too small.
    """
    maps = {name: dict.fromkeys(recipe.widths[0], 0.0) for member in members for name in member.maps}
    sources = {member.source: dict.fromkeys(recipe.widths[1], 0.0) for member in members}
    harmless = Sensitivity(method="none", weights=maps, activations=sources)
    whole = units(members, harmless, bits_of_target(recipe), use=resources.use, rest=resources.rest)
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
        for each in (UNTOUCHED, *bits_of_target(recipe), fewest_of_target(recipe, subject.weight_widths[0])):
            bits = members[node.name].allowed(each)
            group = None if bits.is_float else wanted_weight(node, subject.placement_of(bits)).group
            per_output = 0 if bits.is_float else 1 if group is None else -(-inputs // group)
            found.setdefault(node.name, {})[bits] = linear.outputs * per_output
    return found


def _other_bytes(ready: Prepared, counted: Resources, recipe: Recipe, folder: Workspace) -> int:
    """Return what of a quantized file is no weight, read off a file with the fewest bits everywhere."""
    subject, members = ready.subject, ready.members
    fewest = fewest_of_target(recipe, subject.weight_widths[0])
    bits = {member.name: member.allowed(fewest) for member in members}
    graph, decided = rounded(subject, bits_by_map(members, bits))
    ranges = subject.ranges_of(graph)
    whole = Decided(graph=graph, ranges=ranges.by_name, quantization=decided)
    plan = Plan(decided=whole, passes=ready.placed.passes, ranges=ranges, blocks=())
    path = folder.model("probe")
    write_quantized(plan, path, placement=subject.placement_of(recipe.precision))
    if recipe.chosen_body is not BodyType.FP32:
        typed = folder.model("typed-probe")
        write_body(path, typed, recipe.chosen_body, {})
        path = typed
    weights = sum(counted.use(member, bits[member.name])[Resource.BYTES.value] for member in members)
    return file_bytes(path) - int(weights)
