"""The scores by name: from a subject to what every width of every part is expected to cost."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite
from typing import Final

import torch

from normfuse.errors import BadInput, UsageError
from normfuse.graph import query
from normfuse.progress import Progress, Silent
from normfuse.quant.bits import FLOAT, Bits
from normfuse.quant.score_method import ScoreMethod
from normfuse.sensitivity.contribution import relevance_score, relevance_times_error
from normfuse.sensitivity.curvature import curvature
from normfuse.sensitivity.gradient_error import gradient_error
from normfuse.sensitivity.keeping import FORGETFUL, Keeper
from normfuse.sensitivity.one_at_a_time import one_at_a_time
from normfuse.sensitivity.output_loss import OutputLoss
from normfuse.sensitivity.sensitivity import Kind, Sensitivity, Tally
from normfuse.sensitivity.squared_errors import squared_errors, weighted_by_trace
from normfuse.sensitivity.subject import Subject
from normfuse.sensitivity.traces import Traces, fisher_traces, hessian_traces

__all__ = ["score", "scores_of"]

MEASURED: Final = {ScoreMethod.DIVERGENCE: OutputLoss.DIVERGENCE, ScoreMethod.NOISE: OutputLoss.NOISE}
"""Scores that quantize one part at a time, and what they measure."""

GRADIENTS_AT: Final = 4
"""Bits of the network that ``GRADIENT_ERROR`` takes its gradients from, or the fewest above."""


def scores_of(
    subject: Subject,
    methods: Sequence[ScoreMethod],
    *,
    seed: int = 0,
    progress: Progress | None = None,
    keeper: Keeper = FORGETFUL,
) -> list[Sensitivity]:
    """Return several scores; of those that need class scores only what the network allows.

    Args:
        subject: what is scored.
        methods: in the order of the result.
        seed: see ``score``.
        progress: shows what takes long.
        keeper: knows what an earlier run has finished.

    Raises:
        UsageError: the network allows none.
    """
    is_free = subject.loss is OutputLoss.DIVERGENCE
    wanted = [each for each in methods if is_free or not each.needs_classes] or methods
    found = {each: Sensitivity.from_dict(kept) for each in wanted if (kept := keeper.get(each.value)) is not None}
    missing = [each for each in wanted if each not in found]
    measured = [each for each in MEASURED if each in wanted]
    if len(measured) > 1 and not found.keys() >= set(measured):  # both from one run, which may be finished
        losses = [MEASURED[each] for each in measured]
        both = one_at_a_time(subject, losses, progress=progress or Silent(), keeper=keeper)
        found |= dict(zip(measured, both, strict=True))
    for each in missing:
        if each not in found:
            found[each] = score(subject, each, seed=seed, progress=progress, keeper=keeper)
        _refuse_not_finite(found[each])
        keeper.put(each.value, found[each].as_dict())
    return [found[each] for each in wanted]


def score(
    subject: Subject,
    method: ScoreMethod,
    *,
    seed: int = 0,
    progress: Progress | None = None,
    keeper: Keeper = FORGETFUL,
) -> Sensitivity:
    """Return what every width of every part is expected to cost.

    Args:
        subject: what is scored.
        method: how.
        seed: of random directions and scores.
        progress: shows what takes long.
        keeper: knows what an earlier run has done of the long scores.

    Raises:
        UsageError: the method needs class scores, and the outputs are none, or none is of floating point.
    """
    shown, loss = progress or Silent(), subject.loss
    _refuse_outputs(subject, method, loss)
    match method:
        case ScoreMethod.CURVATURE:
            return curvature(subject, loss, seed=seed, progress=shown, keeper=keeper)
        case ScoreMethod.DIVERGENCE | ScoreMethod.NOISE:
            return one_at_a_time(subject, [MEASURED[method]], progress=shown, keeper=keeper)[0]
        case ScoreMethod.GRADIENT_ERROR:
            return gradient_error(subject, loss, base=_gradients_at(subject), progress=shown)
        case ScoreMethod.RELEVANCE:
            return relevance_score(subject, progress=shown)
        case ScoreMethod.RELEVANCE_ERROR:
            return relevance_times_error(subject, progress=shown)
        case ScoreMethod.FISHER:
            return _traced(subject, method, fisher_traces(subject, progress=shown), shown)
        case ScoreMethod.HESSIAN:
            return _traced(subject, method, hessian_traces(subject, seed=seed, progress=shown), shown)
        case ScoreMethod.RANDOM:
            return _random(subject, seed)


def _refuse_outputs(subject: Subject, method: ScoreMethod, loss: OutputLoss) -> None:
    if not any(query.is_float(node) for node in subject.graph.outputs):
        raise UsageError(
            "the model has no output of floating point",
            where="the model's outputs",
            expected="outputs whose errors have a size",
            hint="capture the model without its argmax",
        )
    if method.needs_classes and loss is not OutputLoss.DIVERGENCE:
        raise UsageError(
            f"the score {method.value} needs class scores",
            where="the model's outputs",
            expected="outputs of shape [batch, classes] or [batch, classes, height, width]",
            hint=f"the score {ScoreMethod.CURVATURE.value} or {ScoreMethod.NOISE.value}, which take any outputs",
        )


def _gradients_at(subject: Subject) -> Bits:
    def nearest(widths: tuple[int, ...]) -> int:
        return next((width for width in widths if width >= GRADIENTS_AT), widths[-1])

    return Bits(nearest(subject.weight_widths), nearest(subject.activation_widths or (FLOAT,)))


def _traced(subject: Subject, method: ScoreMethod, traces: Traces, progress: Progress) -> Sensitivity:
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
    return tally.sensitivity(ScoreMethod.RANDOM.value)


def _refuse_not_finite(found: Sensitivity) -> None:
    """Refuse a score that is no number anywhere: the outputs it follows from are none on some sample."""
    for kind in Kind:
        for name, row in found.of(kind).items():
            if not all(isfinite(amount) for amount in row.values()):
                raise BadInput(
                    f"the score {found.method} of {name} is not finite",
                    where="the model's outputs on the calibration samples",
                    expected="finite outputs, in float and with one layer quantized",
                    hint="check the model on these samples, or another score",
                )
