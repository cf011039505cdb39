"""Gradients times rounding errors: the second-order loss of every part, in the directions that the outputs feel."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Final

import torch
from torch import Tensor, fx

from normfuse.precision.chunks import samples_in
from normfuse.progress import Progress
from normfuse.sensitivity.keeping import FORGETFUL, Keeper, steps
from normfuse.sensitivity.output_loss import OutputLoss
from normfuse.sensitivity.relevance_run import find_activations
from normfuse.sensitivity.rounding_errors import rounding_errors
from normfuse.sensitivity.sample_axes import Samples, tell_samples
from normfuse.sensitivity.sensitivity import Sensitivity, Tally
from normfuse.sensitivity.subject import Subject
from normfuse.sensitivity.watched_run import WatchedRun

__all__ = ["curvature"]

PROBES: Final = 8


def curvature(
    subject: Subject,
    loss: OutputLoss,
    *,
    seed: int,
    progress: Progress,
    probes: int = PROBES,
    keeper: Keeper = FORGETFUL,
) -> Sensitivity:
    """Return ``e^T J^T H J e / 2``, the mean over samples: e a part's rounding error, J the network behind it.

    H is the curvature of the output loss, which has no gradient at the float outputs. With random ``u`` of covariance
    H (``OutputLoss.probe``) it is the mean of ``(g . e)^2 / 2`` over ``g = J^T u``: one gradient per probe serves all
    parts and widths, and errors count as they are, with their signs and correlations. (Ours; Gauss-Newton. The
    literature takes the trace or diagonal of the curvature times the square of the error.)
    """
    tally = Tally()
    with progress.task("following errors to the outputs", len(subject.chunks)) as advance:
        for at, is_done in steps(keeper, "curvature-chunks", [tally], len(subject.chunks)):
            advance(1)
            if is_done:
                continue
            generator = torch.Generator().manual_seed(seed * len(subject.chunks) + at)
            for part, samples in _told_apart(subject, subject.chunks[at]):
                run = WatchedRun.of(subject, part)
                wanted = [value.detach() for value in run.outputs]
                gradients = [run.gradients(loss.probe(wanted, generator)) for _ in range(probes)]
                _add(subject, run, samples, gradients, tally)
    return tally.sensitivity("curvature")


def _told_apart(subject: Subject, chunk: Sequence[Tensor]) -> Iterator[tuple[Sequence[Tensor], Samples]]:
    """Yield a chunk and where its samples stand, or one sample after the other where the shapes do not tell."""
    graph = subject.graph
    count = samples_in(chunk) if graph.has_dynamic_batch else 1
    samples = tell_samples(graph, find_activations(graph), count)
    if samples is not None:
        yield chunk, samples
        return
    for at in range(count):
        yield [x[at : at + 1] if x.ndim else x for x in chunk], Samples(1, {})


def _add(
    subject: Subject, run: WatchedRun, samples: Samples, gradients: Sequence[Mapping[fx.Node, Tensor]], tally: Tally
) -> None:
    """Add what every part costs these samples."""
    rows = {node: torch.stack([samples.rows(node, each[node]) for each in gradients]) for node in run.places}
    for each in rounding_errors(subject, run):
        dots = torch.einsum("pnk,nk->pn", rows[each.place], samples.rows(each.place, each.error))
        amount = float(dots.double().square().mean(dim=0).sum()) / 2
        tally.add(each.kind, each.name, each.bits, amount / subject.samples)
