"""Gradients times rounding errors: the second-order loss of every part, in the directions that the outputs feel."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from normfuse.precision.chunks import samples_in
from normfuse.progress import Progress
from normfuse.sensitivity.keeping import FORGETFUL, Keeper, steps
from normfuse.sensitivity.output_loss import OutputLoss
from normfuse.sensitivity.rounding_errors import rounding_errors
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
            chunk, generator = subject.chunks[at], torch.Generator().manual_seed(seed * len(subject.chunks) + at)
            run, count = WatchedRun.of(subject, chunk), samples_in(chunk)
            wanted = [value.detach() for value in run.outputs]
            found = [run.gradients(loss.probe(wanted, generator)) for _ in range(probes)]
            gradients = {node: _rows([each[node] for each in found], count) for node in run.places}
            for each in rounding_errors(subject, run):
                dots = torch.einsum("pnk,nk->pn", gradients[each.place], each.error.reshape(count, -1))
                amount = float(dots.double().square().mean(dim=0).sum()) / 2
                tally.add(each.kind, each.name, each.bits, amount / subject.samples)
    return tally.sensitivity("curvature")


def _rows(gradients: list[Tensor], count: int) -> Tensor:
    """Return gradients as [probes, samples, elements]."""
    return torch.stack([each.reshape(count, -1) for each in gradients])
