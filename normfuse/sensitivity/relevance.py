"""Layer-wise relevance propagation: how much each tensor of a network took part in its outputs, sample by sample.

What the rules are and where they come from: methods.md 5.2. That sums are made sample by sample is ours.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from normfuse.graph import Graph, ops, query
from normfuse.sensitivity.relevance_call import ByShape, Call, Rule, ratio
from normfuse.sensitivity.relevance_rules import RULES, gradient_times_input
from normfuse.sensitivity.relevance_run import Run, find_activations, run_for_rules
from normfuse.sensitivity.sample_axes import Samples, tell_samples
from normfuse.sensitivity.targets import Target, default_target

__all__ = ["Relevance", "relevance"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Relevance:
    """The relevance of the tensors of a graph for n samples.

    Attributes:
        absolute: by node the sum of ``|R|`` over what it returned, float64 [n]: for every floating-point tensor that
            is computed from the inputs, 0 where no relevance came.
        kept: of the nodes that were to be kept the relevance itself, in their shapes.
        conserved: 1 less what rules have lost, float64 [n]: the sum of R that came to the inputs and to constants falls
            short of what started, over the sum of ``|R|`` that started. Lost is what came to outputs that nothing
            contributes to (positively, in a linear map: to those made of a bias, say).
        absorbed: what came to constants (tables of positions, embeddings, masks; biases get none), over the same sum.
        defaulted: the calls of operators without a rule, see ``gradient_times_input``, in graph order.
    """

    absolute: Mapping[fx.Node, Tensor]
    kept: Mapping[fx.Node, Tensor]
    conserved: Tensor
    absorbed: Tensor
    defaulted: tuple[fx.Node, ...]


@torch.no_grad()  # rules ask for gradients where they need them
def relevance(
    graph: Graph,
    inputs: Sequence[Tensor],
    *,
    target: Target | None = None,
    rules: Mapping[Any, Rule] = RULES,
    keep: Iterable[fx.Node] = (),
) -> Relevance:
    """Return the relevance of every activation of a float graph, from its outputs back to its inputs.

    Samples are never mixed: those of a batch get what each alone would. Where the graph fixes its batch, all of it is
    one sample; where shapes do not tell the samples apart, they are run one by one. What is computed from constants
    alone (Swin v2 makes its position bias so) is a constant, and the maps in it have no relevance.

    Args:
        graph: a graph that computes with floats, best folded, since an affine hands on all whatever it scales.
            Requests for codes may stand in it and change nothing.
        inputs: in the order of the graph's, n samples along the first axis of each.
        target: what relevance starts from; None for ``default_target``.
        rules: by operator its rule; ``{**RULES, operator: rule}`` replaces one.
        keep: nodes that return one tensor, whose relevance is wanted element by element.

    Raises:
        BadInput: an output is not finite.
        UsageError: no output is of floating point.
    """
    activations, target = find_activations(graph), target or default_target
    samples = tell_samples(graph, activations, len(inputs[0]) if graph.has_dynamic_batch else 1)
    if samples is None:
        starts = target(graph.run(*inputs))
        alone = partial(relevance, graph, rules=rules, keep=set(keep))
        parts = ([x[at : at + 1] for x in inputs] for at in range(len(inputs[0])))
        return _joined([alone(part, target=_of_sample(starts, at)) for at, part in enumerate(parts)])
    run = run_for_rules(graph, inputs, activations, rules)
    walk = _Walk(activations, samples, rules, run, keep)
    walk.start(graph.outputs, target(run.outputs))
    for node in reversed(list(graph.nodes)):
        walk.step(node)
    return walk.result()


def _of_sample(starts: Sequence[Tensor | None], at: int) -> Target:
    """Return the target of one sample of a batch."""
    return lambda _: [None if start is None else start[at : at + 1] for start in starts]


def _joined(parts: Sequence[Relevance]) -> Relevance:
    """Return what was found for single samples as what a batch would give."""
    first = parts[0]
    return Relevance(
        absolute={node: torch.cat([each.absolute[node] for each in parts]) for node in first.absolute},
        kept={node: torch.cat([each.kept[node] for each in parts]) for node in first.kept},
        conserved=torch.cat([each.conserved for each in parts]),
        absorbed=torch.cat([each.absorbed for each in parts]),
        defaulted=first.defaulted,
    )


class _Walk:
    """Relevance on its way from the outputs to the inputs; every node is met once, behind all that read it."""

    def __init__(
        self,
        activations: Collection[fx.Node],
        samples: Samples,
        rules: Mapping[Any, Rule],
        run: Run,
        keep: Iterable[fx.Node],
    ) -> None:
        self._activations, self._samples, self._rules, self._run = activations, samples, rules, run
        self._keep = frozenset(keep)
        self._pending: dict[fx.Node, dict[int, Tensor]] = {}  # by node and number of the result
        self._absolute: dict[fx.Node, Tensor] = {}
        self._kept: dict[fx.Node, Tensor] = {}
        self._defaulted: list[fx.Node] = []
        self._nothing = run.outputs[0].new_zeros(samples.count, dtype=torch.float64)
        self._started = self._magnitude = self._arrived = self._absorbed = self._nothing

    def start(self, nodes: Sequence[fx.Node], given: Sequence[Tensor | None]) -> None:
        """Give the outputs their relevance; one that does not depend on the inputs gets none."""
        for node, share in zip(nodes, given, strict=True):
            if share is not None and node in self._activations:
                self._give(node, share.to(self._run.shapes[node].dtype))
                self._started = self._started + self._samples.sums(node, share)
                self._magnitude = self._magnitude + self._samples.sums(node, share.abs())

    def step(self, node: fx.Node) -> None:
        """Hand on what a node got; nobody reads its value any more."""
        if node in self._activations:
            found = self._pending.pop(node, {})
            self._absolute[node] = self._summed(node, [each.abs() for each in found.values()])
            if node in self._keep:
                self._kept[node] = found[0] if found else self._zeros(node)
            if found:
                self._hand_on(node, found)
        self._run.values.pop(node, None)

    def result(self) -> Relevance:
        """Return what was found on the way."""
        lost = self._started - self._arrived - self._absorbed
        return Relevance(
            absolute=self._absolute,
            kept=self._kept,
            conserved=1 - ratio(lost, self._magnitude),
            absorbed=ratio(self._absorbed, self._magnitude),
            defaulted=tuple(reversed(self._defaulted)),
        )

    def _hand_on(self, node: fx.Node, found: Mapping[int, Tensor]) -> None:
        reads = tuple(source for source in node.all_input_nodes if source in self._activations)
        if node.op == "placeholder":
            self._arrived = self._arrived + self._summed(node, found.values())
        elif not reads:
            self._absorbed = self._absorbed + self._summed(node, found.values())
        elif query.is_call(node, ops.GETITEM):
            self._give(reads[0], found[0], at=query.argument(node, 1, "index"))
        else:
            self._distribute(node, reads, found)

    def _distribute(self, node: fx.Node, reads: tuple[fx.Node, ...], found: Mapping[int, Tensor]) -> None:
        rule = self._rules.get(node.target)
        if rule is None:
            self._defaulted.append(node)
            rule = gradient_times_input
        values = {source: self._value(source, rule) for source in node.all_input_nodes}
        call = Call(node=node, values=values, activations=reads, relevances=found, samples=self._samples)
        for source, share in rule(call, next(iter(found.values()))).items():
            if source in self._activations:
                self._give(source, share)
            else:
                self._absorbed = self._absorbed + self._samples.sums(node, share)

    def _value(self, node: fx.Node, rule: Rule) -> Any:
        by_shape = isinstance(rule, ByShape) and node in self._activations
        return (self._run.shapes if by_shape else self._run.values)[node]

    def _give(self, node: fx.Node, share: Tensor, *, at: int = 0) -> None:
        found = self._pending.setdefault(node, {})
        found[at] = found[at] + share if at in found else share

    def _summed(self, node: fx.Node, parts: Iterable[Tensor]) -> Tensor:
        return sum((self._samples.sums(node, part) for part in parts), self._nothing)

    def _zeros(self, node: fx.Node) -> Tensor:
        return torch.zeros_like(self._run.shapes[node], device=self._nothing.device)
