"""Gradients of a quantized network times rounding errors, with a curvature by least squares."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import torch
from torch import Tensor, fx

from normfuse.graph import query
from normfuse.precision.block import floating
from normfuse.precision.decision import Quantization
from normfuse.progress import Progress
from normfuse.quant.bits import Bits
from normfuse.sensitivity.output_loss import OutputLoss
from normfuse.sensitivity.rounding_errors import rounding_errors
from normfuse.sensitivity.sensitivity import Kind, Sensitivity, Tally
from normfuse.sensitivity.subject import Subject
from normfuse.sensitivity.watched_run import WatchedRun

__all__ = ["gradient_error"]

TINY: Final = torch.finfo(torch.float64).tiny


def gradient_error(subject: Subject, loss: OutputLoss, *, base: Bits, progress: Progress) -> Sensitivity:
    """Return ``|sum g . e_b| + sum h e_b^2 / 2``, means over samples.

    g is the gradient of the outputs' loss in the network whose parts have the bits of ``base``, e_b a part's rounding
    error there. The float network has no such gradient: its loss is least. The diagonal h comes from g by least
    squares, ``h = sum g e / sum e^2`` with those e, over samples and axes of any size; negative ones are 0. (The first
    term: AutoRound's mixed-bit schemes, 2025; the second: LS-ViT, CVPR 2026.)

    Args:
        subject: what is scored.
        loss: of the outputs.
        base: of all parts in the run that gradients come from, of the subject's widths.
        progress: shows the chunks, twice.
    """
    decided, first = subject.uniform(base), Tally()
    taken = {Kind.WEIGHT: base.weight, Kind.ACTIVATION: base.activation}
    products, squares = dict[fx.Node, Tensor](), dict[fx.Node, Tensor]()
    for run, gradients in _runs(subject, decided, loss, "taking gradients", progress):
        for each in rounding_errors(subject, run):
            product = gradients[each.place] * each.error
            first.add(each.kind, each.name, each.bits, float(product.double().sum()) / subject.samples)
            if each.bits == taken[each.kind]:
                products[each.place] = _summed(each.place, product) + products.get(each.place, 0.0)
                squares[each.place] = _summed(each.place, each.error.square()) + squares.get(each.place, 0.0)
    curvatures = {node: (products[node] / squares[node].clamp(min=TINY)).clamp(min=0) for node in squares}
    return _with_curvature(subject, decided, first, curvatures, progress)


def _runs(
    subject: Subject, base: Quantization, loss: OutputLoss, label: str, progress: Progress
) -> Iterator[tuple[WatchedRun, dict[fx.Node, Tensor]]]:
    """Yield the runs of the quantized network with the gradients of its loss."""
    with progress.task(label, len(subject.chunks)) as advance:
        for chunk in subject.chunks:
            wanted = floating(subject.graph.run(*chunk))
            run = WatchedRun.of(subject, chunk, base=base)
            with torch.enable_grad():
                total = loss.per_sample(run.outputs, wanted).sum()
                found = torch.autograd.grad(total, list(run.places.values()), materialize_grads=True)
            yield run, dict(zip(run.places, found, strict=True))
            advance(1)


def _with_curvature(
    subject: Subject, base: Quantization, first: Tally, curvatures: dict[fx.Node, Tensor], progress: Progress
) -> Sensitivity:
    tally = Tally()
    for kind in Kind:
        for name, row in first.of(kind).items():
            for width, amount in row.items():
                tally.add(kind, name, width, abs(amount))
    with progress.task("weighing errors", len(subject.chunks)) as advance:
        for chunk in subject.chunks:
            for each in rounding_errors(subject, WatchedRun.of(subject, chunk, base=base)):
                second = (curvatures[each.place] * _summed(each.place, each.error.square())).sum() / 2
                tally.add(each.kind, each.name, each.bits, float(second) / subject.samples)
            advance(1)
    return tally.sensitivity("gradient-error")


def _summed(node: fx.Node, x: Tensor) -> Tensor:
    """Return the sum over samples and other axes of free sizes, float64; they stay with size 1."""
    axes = [axis for axis, size in enumerate(query.shape(node)) if not isinstance(size, int)]
    return x.double().sum(dim=axes, keepdim=True) if axes else x.double()
