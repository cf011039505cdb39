"""The trace of a curvature at every weight and activation: of the Fisher information, or of the Hessian."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor, fx
from torch.nn.attention import SDPBackend, sdpa_kernel

from normfuse.precision.chunks import samples_in
from normfuse.progress import Progress
from normfuse.sensitivity.output_loss import surprise
from normfuse.sensitivity.sensitivity import Kind
from normfuse.sensitivity.subject import Subject
from normfuse.sensitivity.watched_run import WatchedRun

__all__ = ["Traces", "fisher_traces", "hessian_traces"]

PROBES: Final = 32


@dataclass(frozen=True, slots=True)
class Traces:
    """The mean over samples by kind and name, and the number of elements of each part."""

    by_kind: Mapping[Kind, dict[str, float]] = field(
        default_factory=lambda: {kind: defaultdict(float) for kind in Kind}
    )
    elements: Mapping[Kind, dict[str, int]] = field(default_factory=lambda: {kind: {} for kind in Kind})

    def add(self, kind: Kind, name: str, amount: float, elements: int) -> None:
        """Add what some samples give."""
        self.by_kind[kind][name] += amount
        self.elements[kind][name] = elements


def fisher_traces(subject: Subject, *, progress: Progress) -> Traces:
    """Return ``mean ||g||^2`` over samples, g the gradient of ``-log p`` of the class that the float network finds.

    (The empirical Fisher information with the network's own labels: calibration samples have none.) Samples run one
    by one.
    """
    found = Traces()
    singles = [sample for chunk in subject.chunks for sample in _singles(subject, chunk)]
    with progress.task("squaring gradients", len(singles)) as advance:
        for sample in singles:
            run = WatchedRun.of(subject, sample, with_weights=True)
            parts = _parts(subject, run)
            gradients = torch.autograd.grad(surprise(run.outputs), [x for *_, x in parts], materialize_grads=True)
            for (kind, name, x), gradient in zip(parts, gradients, strict=True):
                amount = float(gradient.double().square().sum()) / subject.samples
                found.add(kind, name, amount, _elements(kind, x, sample))
            advance(1)
    return found


def hessian_traces(subject: Subject, *, seed: int, progress: Progress, probes: int = PROBES) -> Traces:
    """Return the trace of the Hessian of ``-log p`` of the class that the float network finds (Hutchinson).

    The mean of ``v . H v`` over random signs v; of activations, whose samples do not meet, all samples of a chunk at
    once. (HAWQ-V2, eq. 5 to 7.)
    """
    generator, found = torch.Generator().manual_seed(seed), Traces()
    with progress.task("multiplying by the Hessian", len(subject.chunks)) as advance, sdpa_kernel(SDPBackend.MATH):
        for chunk in subject.chunks:
            # The kernels that ``quickly`` takes have no second gradients.
            run = WatchedRun.of(subject, chunk, compute=_plainly, with_weights=True)
            parts = _parts(subject, run)
            leaves = [x for *_, x in parts]
            first = torch.autograd.grad(surprise(run.outputs), leaves, create_graph=True, materialize_grads=True)
            for _ in range(probes):
                signs = [_signs(x, generator) for x in leaves]
                second = torch.autograd.grad(first, leaves, signs, retain_graph=True, materialize_grads=True)
                for (kind, name, x), v, hv in zip(parts, signs, second, strict=True):
                    count = _elements(kind, x, chunk)
                    found.add(kind, name, float((v * hv).double().sum()) / probes / subject.samples, count)
            advance(1)
    return found


def _parts(subject: Subject, run: WatchedRun) -> list[tuple[Kind, str, Tensor]]:
    weights = [(Kind.WEIGHT, node.name, weight) for node, weight in run.weights.items()]
    sources = {request.node: request.source.name for request in subject.activations}
    return weights + [(Kind.ACTIVATION, sources[n], x) for n, x in run.places.items() if n in sources]


def _elements(kind: Kind, x: Tensor, chunk: Sequence[Tensor]) -> int:
    """Return the elements of a part for one sample; an activation that is made of constants has any number."""
    return x.numel() if kind is Kind.WEIGHT else max(x.numel() // samples_in(chunk), 1)


def _singles(subject: Subject, chunk: Sequence[Tensor]) -> list[Sequence[Tensor]]:
    """Return the samples of a chunk, or the chunk where the model fixes its batch."""
    if not subject.graph.has_dynamic_batch:
        return [chunk]
    return [[x[at : at + 1] if x.ndim else x for x in chunk] for at in range(samples_in(chunk))]


def _plainly(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return node.target(*args, **kwargs)  # type: ignore[operator]


def _signs(x: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randint(0, 2, x.shape, generator=generator).to(x.dtype) * 2 - 1
