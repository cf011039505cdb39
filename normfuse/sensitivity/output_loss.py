"""What an error of the network's outputs costs, sample by sample, and random directions in which it does."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import Final

import torch
from torch import Tensor

from normfuse.errors import UsageError
from normfuse.graph import Graph, query
from normfuse.quant.output_kind import OutputKind
from normfuse.sensitivity.targets import CLASSES, class_relevance

__all__ = ["OutputLoss", "surprise"]

RANKS: Final = (2, 4)
"""Axes of class scores: [samples, classes], or [samples, classes, height, width]."""


class OutputLoss(Enum):
    """How outputs are compared; the value is what recipes and reports write."""

    DIVERGENCE = "divergence"
    """The Kullback-Leibler divergence of class probabilities, quantized from float.

    Of an image's pixels it is the mean over the classes that float finds there, each the mean over its pixels: classes
    count alike, as in a mean IoU, however large they are (ours).
    """
    NOISE = "noise"
    """The squared error over the squares of the float outputs: the inverse of the SQNR. None where these are 0."""

    @classmethod
    def of(cls, graph: Graph, kind: OutputKind = OutputKind.AUTO) -> OutputLoss:
        """Return how the outputs of a graph are compared: as class scores if they can all be such, or as the user says.

        Raises:
            UsageError: they are said to be classes, and one has not their shape.
        """
        outputs = [node for node in graph.outputs if query.is_float(node)]
        if kind is OutputKind.VALUES:
            return cls.NOISE
        are_classes = all(query.rank(node) in RANKS and query.shape(node)[CLASSES] != 1 for node in outputs)
        if kind is OutputKind.CLASSES and not (outputs and are_classes):
            raise UsageError(
                "the outputs are no class scores",
                where="the model's outputs",
                expected="[batch, classes] or [batch, classes, height, width], every one",
                hint="--outputs values",
            )
        return cls.DIVERGENCE if outputs and are_classes else cls.NOISE

    def per_sample(self, found: Sequence[Tensor], wanted: Sequence[Tensor]) -> Tensor:
        """Return the loss of every sample, float64 [n], summed over the outputs."""
        losses = [self._loss(*each) for each in zip(found, wanted, strict=True)]
        return torch.stack(losses).sum(dim=0)

    def _loss(self, found: Tensor, wanted: Tensor) -> Tensor:
        found, wanted = found.double(), wanted.double()
        if self is OutputLoss.NOISE:
            return _rows(found - wanted).square().sum(dim=1) / _size(wanted)
        exact, guessed = wanted.log_softmax(CLASSES), found.log_softmax(CLASSES)
        apart = torch.where(exact.isinf(), 0.0, exact - guessed)  # a class that is ruled out has no part in it
        return _rows((exact.exp() * apart).sum(dim=CLASSES) * _shares(wanted)).sum(dim=1)

    def probe(self, wanted: Sequence[Tensor], generator: torch.Generator) -> list[Tensor]:
        """Return random cotangents ``S v`` of the outputs, for normal v, with ``S S^T`` the curvature of the loss.

        For a small change d of the outputs the loss is ``d^T S S^T d / 2`` (twice that for ``NOISE``, which has no
        half), so that the mean of ``(d . S v)^2`` over v is the loss, but for that factor. For the divergence
        ``S = diag(sqrt p) - p sqrt(p)^T``, since ``S S^T = diag p - p p^T``.
        """
        return [self._probe(each, generator) for each in wanted]

    def _probe(self, wanted: Tensor, generator: torch.Generator) -> Tensor:
        v = torch.randn(wanted.shape, generator=generator, dtype=torch.float64)
        found: Tensor
        if self is OutputLoss.NOISE:
            found = v * (2 / _size(wanted.double())).sqrt().reshape(-1, *[1] * (wanted.ndim - 1))
            return found.to(wanted.dtype)
        p = wanted.double().softmax(CLASSES)
        found = p.sqrt() * v - p * (p.sqrt() * v).sum(dim=CLASSES, keepdim=True)
        return (found * _shares(p).sqrt().unsqueeze(CLASSES)).to(wanted.dtype)


def surprise(outputs: Sequence[Tensor]) -> Tensor:
    """Return ``-log p`` of the class that the network finds, summed over samples; pixels count as in the divergence."""
    return torch.stack(
        [-(value.log_softmax(CLASSES).amax(dim=CLASSES) * _shares(value)).sum() for value in outputs]
    ).sum()


def _shares(scores: Tensor) -> Tensor:
    """Return what every pixel counts, [samples, ...] without the axis of classes: see ``class_relevance``."""
    return class_relevance(scores, scores.argmax(dim=CLASSES)).sum(dim=CLASSES)


def _size(wanted: Tensor) -> Tensor:
    """Return the sum of every sample's squares; infinite where all are 0, as no error is relative to that."""
    found = _rows(wanted).square().sum(dim=1)
    return found.masked_fill(found == 0, torch.inf)


def _rows(x: Tensor) -> Tensor:
    return x.reshape(len(x), -1)
