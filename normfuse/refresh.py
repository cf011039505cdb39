"""Batch norm statistics estimated again from samples, before they are frozen into weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from normfuse.errors import BadInput
from normfuse.graph import Graph, ops, query
from normfuse.graph.edit import editing
from normfuse.progress import Progress

__all__ = ["refresh_norms"]

Stream = Callable[[], Iterator[Sequence[Tensor]]]


@dataclass(slots=True)
class _Moments:
    """Sums over the positions of one channel, sample by sample, about the old mean (so that nothing cancels)."""

    about: Tensor
    count: int = 0
    first: list[Tensor] = field(default_factory=list)
    second: list[Tensor] = field(default_factory=list)

    def add(self, x: Tensor) -> None:
        """Add ``x`` [batch, channels, ...]."""
        offset = x.double().transpose(0, 1).flatten(1) - self.about[:, None]
        self.count += offset.shape[1]
        self.first.append(offset.sum(1))
        self.second.append((offset * offset).sum(1))

    def statistics(self) -> tuple[Tensor, Tensor]:
        """Return mean and unbiased variance; the order of the samples does not matter."""
        first, second = _exact(self.first) / self.count, _exact(self.second) / self.count
        variance = (second - first * first).clamp_min(0.0) * (self.count / max(self.count - 1, 1))
        return self.about + first, variance


def _exact(sums: Sequence[Tensor]) -> Tensor:
    """Return the sum of vectors, every entry rounded once."""
    columns = torch.stack(list(sums), dim=1).tolist()
    return torch.tensor([math.fsum(column) for column in columns], dtype=torch.float64)


class _EnoughSeen(Exception):
    """The rest of the graph is of no interest."""


def refresh_norms(graph: Graph, samples: Stream, *, total: int, progress: Progress) -> int:
    """Replace mean and variance of every batch norm by those of its input over all samples; return their number.

    A norm that is called several times is one norm: it gets the mean of its calls' means and variances, every call
    counted once, which is what PyTorch accumulates (momentum None). Where its calls stand behind each other, what
    stands between them sees the mean of the calls in front.

    A norm behind another sees what the refreshed one makes, so there is one run over the samples per norm in a row
    (methods 2.3 does it in one, with batch statistics that depend on how samples meet; this is ours). The result
    depends neither on the order nor on the batches of the samples. The graph is changed in place.

    Args:
        graph: a captured model.
        samples: calibration samples, one at a time.
        total: their number, for the bar.
        progress: shows the runs.

    Raises:
        BadInput: there are no samples, or a norm's input is not finite.
    """
    levels = _levels(graph)
    calls = _calls_by_norm(norm for norms in levels for norm in norms)
    statistics: dict[fx.Node, tuple[Tensor, Tensor]] = {}
    with progress.task("refreshing batch norms", total=len(levels) * total) as advance:
        for norms in levels:
            moments = {norm: _Moments(query.constant(graph, norm.args[3]).double()) for norm in norms}  # type: ignore[arg-type]
            for sample in samples():
                _observe(graph, sample, moments)
                advance(1)
            statistics |= {norm: _statistics(norm, seen) for norm, seen in moments.items()}
            _write(graph, [norm for norm in calls if not moments.keys().isdisjoint(norm)], statistics)
    return len(calls)


def _calls_by_norm(norms: Iterable[fx.Node]) -> list[list[fx.Node]]:
    """Return the calls of each norm: those that read the same two statistics."""
    calls: dict[tuple[Any, ...], list[fx.Node]] = {}
    for norm in norms:
        calls.setdefault(norm.args[3:5], []).append(norm)
    return list(calls.values())


def _levels(graph: Graph) -> list[list[fx.Node]]:
    """Return the batch norms by the number of batch norms in front of them."""
    depth: dict[fx.Node, int] = {}
    levels: list[list[fx.Node]] = []
    for node in graph.nodes:
        before = max((depth[source] for source in node.all_input_nodes), default=0)
        is_norm = query.is_call(node, ops.BATCH_NORM) and all(query.is_constant(node.args[index]) for index in (3, 4))
        depth[node] = before + is_norm
        if is_norm:
            levels += [[]] if len(levels) == before else []
            levels[before].append(node)
    return levels


def _observe(graph: Graph, sample: Sequence[Tensor], moments: dict[fx.Node, _Moments]) -> None:
    waiting = {norm.args[0]: [other for other in moments if other.args[0] is norm.args[0]] for norm in moments}

    def watch(node: fx.Node, value: Any) -> Any:
        for norm in waiting.pop(node, ()):
            moments[norm].add(value)
        if not waiting:
            raise _EnoughSeen
        return value

    try:
        graph.run_watched(sample, watch)
    except _EnoughSeen:
        return


def _statistics(norm: fx.Node, seen: _Moments) -> tuple[Tensor, Tensor]:
    if not seen.count:
        raise BadInput("there are no samples to refresh the batch norms with", expected="calibration samples")
    mean, variance = seen.statistics()
    if not bool(mean.isfinite().all() and variance.isfinite().all()):
        raise BadInput("a batch norm's input is not finite", where=query.layer_of(norm) or norm.name)
    return mean, variance


def _write(graph: Graph, norms: Sequence[Sequence[fx.Node]], statistics: dict[fx.Node, tuple[Tensor, Tensor]]) -> None:
    """Give all calls of a norm the mean of what those seen so far have shown."""
    with editing(graph) as edit:
        for calls in norms:
            shown = [statistics[call] for call in calls if call in statistics]
            first, *others = calls
            label, dtype = query.layer_of(first) or first.name, query.dtype(first.args[3])  # type: ignore[arg-type]
            for position, values, name in zip((3, 4), zip(*shown, strict=True), ("mean", "var"), strict=True):
                mean = torch.stack(values).mean(0).to(dtype)
                edit.set_constant(first, position, mean, f"{label}.running_{name}")
                for other in others:
                    edit.set_argument(other, position, first.args[position])
