"""Computes a graph with requests as it will be: activations moved to their codes' values, weights too."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx

from normfuse.graph import ops
from normfuse.graph.quantization import is_requested
from normfuse.graph.quickly import linear, quickly
from normfuse.precision.decision import Quantization
from normfuse.quant import ActivationParams, snap

__all__ = ["Simulation", "call_with", "in_float", "params_of_request", "source_of_request"]


class Simulation:
    """A ``Compute``: what was decided is computed with codes' values, the rest as the graph says."""

    def __init__(self, decided: Quantization) -> None:
        self._decided = decided
        self._values: dict[str, Tensor] = {}  # of the maps that were met: a block has few of them

    def __call__(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the value of one call."""
        if is_requested(node):
            params = params_of_request(node, self._decided)
            return args[0] if params is None else snap(args[0], params)
        if (weight := self._decided.weights.get(node.name)) is None:
            return quickly(node, args, kwargs)
        if node.name not in self._values:
            self._values[node.name] = weight.values
        return call_with(node, args, kwargs, self._values[node.name], weight.bias)


def in_float(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Compute what the graph says, past its requests (their operator has no gradient)."""
    return args[0] if is_requested(node) else quickly(node, args, kwargs)


def params_of_request(node: fx.Node, decided: Quantization) -> ActivationParams | None:
    """Return the parameters of the tensor that a request stands behind."""
    return decided.activations.get(source_of_request(node))


def source_of_request(node: fx.Node) -> str:
    """Return the name of the node that makes the tensor that a request stands behind."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    return source.name


def call_with(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any], weight: Tensor, bias: Tensor | None) -> Any:
    """Compute a linear map with another weight and bias."""
    if node.target is ops.LINEAR:
        return linear(args[0], weight, bias)
    options = {key: value for key, value in kwargs.items() if key != "bias"}
    return node.target(args[0], weight, bias, *args[3:], **options)  # type: ignore[operator]
