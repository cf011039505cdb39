"""What a rule of relevance propagation is given, what it hands back, and the arithmetic that rules share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor, fx

from normfuse.sensitivity.sample_axes import Samples

__all__ = [
    "ByShape",
    "Call",
    "Rule",
    "Shares",
    "added",
    "arguments",
    "gradients",
    "operands",
    "ratio",
    "times_gradient",
    "total",
]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Call:
    """A call of an operator as it was computed, and the relevance of what it returned.

    Attributes:
        node: the call in the graph.
        values: what it read, by node; a rule that goes ``ByShape`` finds shapes in place of activations.
        activations: the arguments that relevance goes on to: floating-point tensors computed from the model's inputs.
            All others are constants: what a rule gives to them counts as absorbed.
        relevances: by the number of a result its relevance, in its shape; one, 0, for a call that returns a tensor.
        samples: how to sum over every sample of a batch.
    """

    node: fx.Node
    values: Mapping[fx.Node, Any]
    activations: tuple[fx.Node, ...]
    relevances: Mapping[int, Tensor]
    samples: Samples

    @property
    def args(self) -> tuple[Any, ...]:
        """The call's positional arguments, values in place of nodes."""
        _, found, _ = arguments(self.node, self.values)
        return found

    @property
    def output(self) -> Any:
        """What the call returned, computed again."""
        return self.run({})

    def run(self, instead: Mapping[fx.Node, Tensor]) -> Any:
        """Return what the operator makes of other values for some arguments."""
        values = {**self.values, **instead}
        target, args, kwargs = arguments(self.node, values)
        return target(*args, **kwargs)

    def fitted(self, node: fx.Node, share: Tensor) -> Tensor:
        """Return a share in its argument's shape and type, summed where that was broadcast; a constant's as it is."""
        if node not in self.activations:
            return share
        value: Tensor = self.values[node]
        return share.sum_to_size(value.shape).to(value.dtype)


Shares = Mapping[fx.Node, Tensor]
"""By argument its relevance, in the argument's shape (for a constant in any that has the output's axis of samples)."""

Rule = Callable[[Call, Tensor], Shares]
"""From a call and the relevance of its output (of the first one that has any) to that of its arguments.

What is not handed on is lost, and ``Relevance.conserved`` says so. Samples must not be mixed.
"""


@dataclass(frozen=True, slots=True)
class ByShape:
    """A rule that reads no activation: it finds tensors on the device ``meta`` in their place, so none is kept."""

    rule: Rule

    def __call__(self, call: Call, relevance: Tensor) -> Shares:
        """Apply the rule."""
        return self.rule(call, relevance)


def arguments(node: fx.Node, values: Mapping[fx.Node, Any]) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """Return what a node calls, and with what: values in place of nodes."""
    args: Any = fx.map_arg(node.args, values.__getitem__)
    kwargs: Any = fx.map_arg(node.kwargs, values.__getitem__)
    return node.target, args, kwargs


def operands(node: fx.Node) -> list[fx.Node]:
    """Return the nodes among the positional arguments, in order; one that stands in two places comes twice."""
    found = list[fx.Node]()
    fx.map_arg(node.args, found.append)
    return found


def ratio(relevance: Tensor, contribution: Tensor) -> Tensor:
    """Return ``R / Z``; 0 where Z is 0, or so small that the quotient is no number."""
    return (relevance / contribution).nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)


def added(shares: Iterable[tuple[fx.Node, Tensor]]) -> Shares:
    """Return shares by argument; an argument that stands in two places gets their sum."""
    found = dict[fx.Node, Tensor]()
    for node, share in shares:
        found[node] = found[node] + share if node in found else share
    return found


def gradients(outputs: Sequence[Tensor], leaves: Sequence[Tensor], given: Sequence[Tensor]) -> Sequence[Tensor]:
    """Return the gradients of ``sum(outputs * given)`` by the leaves; 0 by those that nothing depends on."""
    return torch.autograd.grad(outputs, leaves, given, allow_unused=True, materialize_grads=True)


def total(parts: Sequence[Tensor]) -> Tensor:
    """Return the sum of one tensor or more."""
    return reduce(torch.add, parts)


def times_gradient(compute: Callable[..., Tensor], inputs: Sequence[Tensor], relevance: Tensor) -> list[Tensor]:
    """Return ``x * dZ/dx(S)`` for every input x of ``Z = compute(*inputs)``, with ``S = R / Z``."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    with torch.enable_grad():
        output = compute(*leaves)
    found = gradients([output], leaves, [ratio(relevance, output.detach())])
    return [x * gradient for x, gradient in zip(inputs, found, strict=True)]
