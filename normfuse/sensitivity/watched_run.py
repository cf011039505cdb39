"""A run of the network that keeps what is scored, with gradients: inputs of linear maps, weights, activations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor, fx

from normfuse.graph.quantization import is_requested
from normfuse.graph.quickly import quickly
from normfuse.graph.segments import Compute
from normfuse.precision.block import floating
from normfuse.precision.decision import Quantization
from normfuse.precision.simulation import call_with, params_of_request
from normfuse.quant import snap
from normfuse.sensitivity.subject import Subject

__all__ = ["NOTHING", "WatchedRun"]

NOTHING: Final = Quantization(activations={}, weights={})


@dataclass(slots=True, kw_only=True, eq=False)
class WatchedRun:
    """One chunk's run: outputs and what stands at the scored places, all with a way back for gradients.

    Attributes:
        outputs: the network's floating-point outputs.
        inputs: what every scored map reads, by the map, without gradients.
        weights: the weights as leaves, where they were asked for; else none.
        places: the map's output, and the scored activation by its request.
    """

    outputs: list[Tensor]
    inputs: dict[fx.Node, Tensor] = field(default_factory=dict)
    weights: dict[fx.Node, Tensor] = field(default_factory=dict)
    places: dict[fx.Node, Tensor] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        subject: Subject,
        chunk: Sequence[Tensor],
        *,
        base: Quantization = NOTHING,
        compute: Compute = quickly,
        with_weights: bool = False,
    ) -> WatchedRun:
        """Run a chunk.

        Args:
            subject: whose graph.
            chunk: one tensor per input.
            base: what is quantized in this run; gradients pass rounding as if it were not there.
            compute: computes every call that is not quantized.
            with_weights: whether gradients of the weights are wanted.
        """
        run = cls(outputs=[])
        maps, scored = set(subject.maps), {request.node for request in subject.activations}

        def watched(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if is_requested(node):
                x = run._placed(node, args[0].view_as(args[0])) if node in scored else args[0]
                params = params_of_request(node, base)
                return x if params is None else x + (snap(x.detach(), params) - x.detach())
            if node not in maps:
                return compute(node, args, kwargs)
            run.inputs[node] = args[0].detach()
            if with_weights:
                run.weights[node] = args[1].detach().requires_grad_()
                args = (args[0], run.weights[node], *args[2:])
            rounded = base.weights.get(node.name)
            value = (
                compute(node, args, kwargs)
                if rounded is None
                else call_with(node, args, kwargs, rounded.values, rounded.bias)
            )
            return run._placed(node, value)

        with torch.enable_grad():
            outputs = subject.graph.run_as(chunk, watched)
        run.outputs = floating(outputs)
        return run

    def _placed(self, node: fx.Node, value: Tensor) -> Tensor:
        self.places[node] = value if value.requires_grad else value.requires_grad_()
        return value

    def gradients(self, cotangents: Sequence[Tensor]) -> dict[fx.Node, Tensor]:
        """Return the gradients of the outputs along cotangents, at every place; 0 where no output comes from."""
        given = [each for each in zip(self.outputs, cotangents, strict=True) if each[0].requires_grad]
        outputs, along = zip(*given, strict=True)
        found = torch.autograd.grad(
            outputs, list(self.places.values()), along, retain_graph=True, materialize_grads=True
        )
        return dict(zip(self.places, found, strict=True))
