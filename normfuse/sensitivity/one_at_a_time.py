"""One part quantized alone, the rest of the network as it is: what that costs at the outputs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

import torch
from torch import Tensor

from normfuse.graph.segments import Segment, joined, read_after, run_segment, segments
from normfuse.heap import give_back_memory
from normfuse.precision.block import Values, floating, forget, tensors_of
from normfuse.precision.decision import Quantization
from normfuse.precision.simulation import Simulation
from normfuse.progress import Progress
from normfuse.quant.score_method import ScoreMethod
from normfuse.sensitivity.keeping import FORGETFUL, Keeper, steps
from normfuse.sensitivity.output_loss import OutputLoss
from normfuse.sensitivity.sensitivity import Kind, Sensitivity, Tally
from normfuse.sensitivity.subject import Subject
from normfuse.sensitivity.watched_run import NOTHING

__all__ = ["one_at_a_time"]

NAMES: Final = {OutputLoss.DIVERGENCE: ScoreMethod.DIVERGENCE.value, OutputLoss.NOISE: ScoreMethod.NOISE.value}

Trial = tuple[Kind, str, int, Quantization]
"""Kind, name and bits of the part that changes, and the decision with it."""


@torch.no_grad()
def one_at_a_time(
    subject: Subject,
    losses: Sequence[OutputLoss],
    *,
    progress: Progress,
    base: Quantization = NOTHING,
    keeper: Keeper = FORGETFUL,
) -> list[Sensitivity]:
    """Return for every loss what each part costs at each width, measured, the mean over samples.

    The float network's values in front of a segment are kept, so that a part is tried on what comes behind it only.

    Args:
        subject: what is scored.
        losses: all are measured on the same runs.
        progress: shows the segments.
        base: the rest of the network; float where it says nothing.
        keeper: knows the segments that an earlier run has done.
    """
    graph, maps = subject.graph, set(subject.maps)
    parts = segments(graph, wanted=lambda node: node in maps)
    tallies = [Tally() for _ in losses]
    values = [dict(zip(graph.inputs, chunk, strict=True)) for chunk in subject.chunks]
    wanted = [floating(graph.run(*chunk)) for chunk in subject.chunks]
    simulation = Simulation(base)
    with progress.task("quantizing one part at a time", len(parts)) as advance:
        label = "+".join(NAMES[loss] for loss in losses)
        for index, is_done in steps(keeper, f"{label}-segments", tallies, len(parts)):
            segment = parts[index]
            rest, later = joined(parts[index + 1 :]), read_after(graph, parts[index + 1 :])
            behind = Simulation(base)
            for kind, name, bits, decided in () if is_done else _trials(subject, segment, base):
                changed = Simulation(decided)
                for chunk, exact in zip(values, wanted, strict=True):
                    outputs = _outputs(subject, segment, rest, dict(chunk), changed, behind)
                    for tally, loss in zip(tallies, losses, strict=True):
                        tally.add(kind, name, bits, float(loss.per_sample(outputs, exact).sum()) / subject.samples)
            for chunk in values:
                run_segment(graph, segment, chunk, simulation)
                forget(chunk, later)
            give_back_memory()
            advance(1)
    return [tally.sensitivity(NAMES[loss]) for tally, loss in zip(tallies, losses, strict=True)]


def _trials(subject: Subject, segment: Segment, base: Quantization) -> Iterator[Trial]:
    nodes = set(segment.nodes)
    for request in subject.activations:
        if request.node in nodes:
            for bits in subject.activation_widths:
                if (params := subject.params(request, bits)) is not None:
                    name = request.source.name
                    yield Kind.ACTIVATION, name, bits, base.changed(activations={name: params})
    for node in subject.maps:
        if node in nodes:
            for bits in subject.weight_widths:
                yield Kind.WEIGHT, node.name, bits, base.changed(weights={node.name: subject.weight(node, bits)})


def _outputs(
    subject: Subject, segment: Segment, rest: Segment, values: Values, changed: Simulation, behind: Simulation
) -> list[Tensor]:
    run_segment(subject.graph, segment, values, changed)
    run_segment(subject.graph, rest, values, behind)
    return tensors_of(subject.graph.outputs, values)
