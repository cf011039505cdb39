"""The scores by name: from a subject to what every width of every part is expected to cost."""

from __future__ import annotations

from enum import Enum
from typing import Final

import torch

from normfuse.errors import UsageError
from normfuse.progress import Progress, Silent
from normfuse.quant.bits import Bits
from normfuse.sensitivity.contribution import relevance_score, relevance_times_error
from normfuse.sensitivity.curvature import curvature
from normfuse.sensitivity.gradient_error import gradient_error
from normfuse.sensitivity.one_at_a_time import one_at_a_time
from normfuse.sensitivity.output_loss import OutputLoss
from normfuse.sensitivity.sensitivity import Kind, Sensitivity, Tally
from normfuse.sensitivity.squared_errors import squared_errors, weighted_by_trace
from normfuse.sensitivity.subject import Subject
from normfuse.sensitivity.traces import Traces, fisher_traces, hessian_traces

__all__ = ["DEFAULT", "Method", "score"]

GRADIENTS_AT: Final = 4
"""Bits of the network that ``GRADIENT_ERROR`` takes its gradients from, or the fewest above."""


class Method(Enum):
    """A score; the value is what the command line and files write."""

    CURVATURE = "curvature"
    """Rounding errors followed to the outputs by gradients (Gauss-Newton): the loss to second order."""
    DIVERGENCE = "kl"
    """One part quantized at a time: the divergence of the class probabilities, measured."""
    NOISE = "sqnr"
    """One part quantized at a time: the relative squared error of the outputs, measured."""
    GRADIENT_ERROR = "gradient-error"
    """Gradients of a quantized network times rounding errors, and a least-squares curvature."""
    RELEVANCE = "lrp"
    """The layer's share of the relevance times the power of uniform noise."""
    RELEVANCE_ERROR = "lrp-error"
    """The layer's share of the relevance times the measured relative error."""
    FISHER = "fisher"
    """The trace of the empirical Fisher information times the squared rounding error."""
    HESSIAN = "hessian"
    """The trace of the Hessian times the squared rounding error."""
    RANDOM = "random"
    """What every score must beat."""

    @property
    def needs_classes(self) -> bool:
        """Whether the outputs must be class scores."""
        return self in (Method.DIVERGENCE, Method.FISHER, Method.HESSIAN)


DEFAULT: Final = (Method.CURVATURE, Method.DIVERGENCE, Method.NOISE)
"""The scores among which the network chooses where the user does not, see ``choose``."""


def score(subject: Subject, method: Method, *, seed: int = 0, progress: Progress | None = None) -> Sensitivity:
    """Return what every width of every part is expected to cost.

    Args:
        subject: what is scored.
        method: how.
        seed: of random directions and scores.
        progress: shows what takes long.

    Raises:
        UsageError: the method needs class scores, and the outputs are none.
    """
    shown, loss = progress or Silent(), OutputLoss.of(subject.graph)
    if method.needs_classes and loss is not OutputLoss.DIVERGENCE:
        raise UsageError(
            f"the score {method.value} needs class scores",
            where="the model's outputs",
            expected="outputs of shape [batch, classes] or [batch, classes, height, width]",
            hint=f"--method {Method.CURVATURE.value} or {Method.NOISE.value} take any outputs",
        )
    match method:
        case Method.CURVATURE:
            return curvature(subject, loss, seed=seed, progress=shown)
        case Method.DIVERGENCE | Method.NOISE:
            chosen = OutputLoss.DIVERGENCE if method is Method.DIVERGENCE else OutputLoss.NOISE
            return one_at_a_time(subject, [chosen], progress=shown)[0]
        case Method.GRADIENT_ERROR:
            return gradient_error(subject, loss, base=_gradients_at(subject), progress=shown)
        case Method.RELEVANCE:
            return relevance_score(subject, progress=shown)
        case Method.RELEVANCE_ERROR:
            return relevance_times_error(subject, progress=shown)
        case Method.FISHER:
            return _traced(subject, method, fisher_traces(subject, progress=shown), shown)
        case Method.HESSIAN:
            return _traced(subject, method, hessian_traces(subject, seed=seed, progress=shown), shown)
        case Method.RANDOM:
            return _random(subject, seed)


def _gradients_at(subject: Subject) -> Bits:
    def nearest(widths: tuple[int, ...]) -> int:
        return next((width for width in widths if width >= GRADIENTS_AT), widths[-1])

    return Bits(nearest(subject.weight_widths), nearest(subject.activation_widths))


def _traced(subject: Subject, method: Method, traces: Traces, progress: Progress) -> Sensitivity:
    errors = squared_errors(subject, progress=progress)
    return weighted_by_trace(method.value, errors, traces.by_kind, traces.elements)


def _random(subject: Subject, seed: int) -> Sensitivity:
    """Return random importances times the power of uniform noise; their logarithms are spread over two decades."""
    generator, tally = torch.Generator().manual_seed(seed), Tally()
    names = [(Kind.WEIGHT, node.name, subject.weight_widths) for node in subject.maps]
    names += [(Kind.ACTIVATION, each.source.name, subject.activation_widths) for each in subject.activations]
    for kind, name, widths in names:
        importance = 100.0 ** float(torch.rand((), generator=generator))
        for bits in widths:
            tally.add(kind, name, bits, importance * 4.0**-bits)
    return tally.sensitivity(Method.RANDOM.value)
