"""How far rounding moves every part: by itself, and relative to what its linear maps write."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from normfuse.graph import query
from normfuse.progress import Progress
from normfuse.rewrite.linear_map import read_linear_map
from normfuse.sensitivity.rounding_errors import bare, rounding_errors
from normfuse.sensitivity.sensitivity import Kind, Sensitivity, Tally
from normfuse.sensitivity.subject import Subject
from normfuse.sensitivity.watched_run import WatchedRun

__all__ = ["SquaredErrors", "squared_errors", "weighted_by_trace"]

Table = Mapping[str, Mapping[int, float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class SquaredErrors:
    """Mean squares over samples, by kind, name and bits.

    Attributes:
        own: ``||W_b - W||^2``, and ``||x_b - x||^2``.
        relative: ``||e||^2 / ||y||^2`` of what a map writes without its bias, e from its weight alone; of an
            activation the mean over the maps that read it.
    """

    own: Mapping[Kind, Table]
    relative: Mapping[Kind, Table]


def squared_errors(subject: Subject, *, progress: Progress) -> SquaredErrors:
    """Return the errors of every part at every width, in one run over the samples."""
    own, noise, power = Tally(), Tally(), dict[str, float]()
    for node in subject.maps:
        linear = read_linear_map(subject.graph, node)
        assert linear is not None
        for bits in subject.weight_widths:
            own.add(Kind.WEIGHT, node.name, bits, _square(subject.weight(node, bits).values - linear.weight))
    with progress.task("measuring rounding errors", len(subject.chunks)) as advance:
        for chunk in subject.chunks:
            _add(subject, WatchedRun.of(subject, chunk), own, noise, power)
            advance(1)
    return SquaredErrors(own={kind: own.of(kind) for kind in Kind}, relative=_relative(subject, noise, power))


def _add(subject: Subject, run: WatchedRun, own: Tally, noise: Tally, power: dict[str, float]) -> None:
    """Add a chunk: squares of activations' errors, and of what maps write, right and wrong."""
    weights = {node: query.constant(subject.graph, node.args[1]) for node in run.inputs}  # type: ignore[arg-type]
    for node, x in run.inputs.items():
        power[node.name] = power.get(node.name, 0.0) + _square(bare(node, x, weights[node]))
    for each in rounding_errors(subject, run):
        if each.kind is Kind.WEIGHT:
            noise.add(each.kind, each.name, each.bits, _square(each.error))
            continue
        own.add(each.kind, each.name, each.bits, _square(each.error) / subject.samples)
        for reader in query.readers(each.place):
            if reader in weights:
                error = _square(bare(reader, each.error, weights[reader]))
                noise.add(each.kind, f"{each.name}/{reader.name}", each.bits, error)


def _relative(subject: Subject, noise: Tally, power: Mapping[str, float]) -> dict[Kind, Table]:
    def over(row: Mapping[int, float], node: str) -> dict[int, float]:
        return {bits: error / power[node] if power[node] > 0 else 0.0 for bits, error in row.items()}

    weights = {name: over(row, name) for name, row in noise.of(Kind.WEIGHT).items()}
    readers = dict[str, list[dict[int, float]]]()
    for pair, row in noise.of(Kind.ACTIVATION).items():
        name, node = pair.split("/")
        readers.setdefault(name, []).append(over(row, node))
    activations = {
        name: {bits: sum(row[bits] for row in rows) / len(rows) for bits in rows[0]} for name, rows in readers.items()
    }
    return {Kind.WEIGHT: weights, Kind.ACTIVATION: activations}


def weighted_by_trace(
    method: str,
    errors: SquaredErrors,
    traces: Mapping[Kind, Mapping[str, float]],
    elements: Mapping[Kind, Mapping[str, int]],
) -> Sensitivity:
    """Return half the mean curvature per element times the squared error (HAWQ-V2, eq. 2: trace / n * ||dW||^2).

    A Hessian's trace can be negative at an activation; its size counts (ours: as 0 it would make any error free).
    """
    tally = Tally()
    for kind in Kind:
        for name, row in errors.own[kind].items():
            for bits, error in row.items():
                tally.add(kind, name, bits, abs(traces[kind].get(name, 0.0)) / elements[kind][name] * error / 2)
    return tally.sensitivity(method)


def _square(x: Tensor) -> float:
    return float(x.detach().double().square().sum())
