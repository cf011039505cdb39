"""What rounding every part to every width changes at its place: the activation, or the output of the linear map."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from normfuse.precision.simulation import call_with
from normfuse.quant import snap
from normfuse.rewrite.linear_map import read_linear_map
from normfuse.sensitivity.sensitivity import Kind
from normfuse.sensitivity.subject import Subject
from normfuse.sensitivity.watched_run import WatchedRun

__all__ = ["RoundingError", "bare", "rounding_errors"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RoundingError:
    """One part at one width.

    Attributes:
        kind: weight or activation.
        name: of the linear map, or of the node that makes the activation.
        bits: of its codes.
        place: the node where the error is: the map, or the activation's request.
        error: rounded less exact, of the place's shape.
    """

    kind: Kind
    name: str
    bits: int
    place: fx.Node
    error: Tensor


def rounding_errors(subject: Subject, run: WatchedRun) -> Iterator[RoundingError]:
    """Yield the errors of one chunk, part by part, without gradients."""
    for request in subject.activations:
        if (found := run.places.get(request.node)) is not None:
            x = found.detach()
            for bits in subject.activation_widths:
                if (params := subject.params(request, bits)) is not None:
                    error = snap(x, params) - x
                    yield RoundingError(
                        kind=Kind.ACTIVATION, name=request.source.name, bits=bits, place=request.node, error=error
                    )
    for node, x in run.inputs.items():
        linear = read_linear_map(subject.graph, node)
        assert linear is not None
        for bits in subject.weight_widths:
            error = bare(node, x, subject.weight(node, bits).values - linear.weight)
            yield RoundingError(kind=Kind.WEIGHT, name=node.name, bits=bits, place=node, error=error)


@torch.no_grad()
def bare(node: fx.Node, x: Tensor, weight: Tensor) -> Tensor:
    """Return what a linear map makes of ``x`` with another weight and no bias."""
    kwargs: dict[str, Any] = dict(node.kwargs)
    found: Tensor = call_with(node, (x, *node.args[1:]), kwargs, weight, None)
    return found
