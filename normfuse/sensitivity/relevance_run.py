"""The forward run of relevance propagation: which tensors carry relevance, and what rules will read of them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from normfuse.errors import BadInput
from normfuse.graph import Graph, metadata, query
from normfuse.graph.quickly import quickly
from normfuse.sensitivity.relevance_call import ByShape, Rule, arguments

__all__ = ["Run", "find_activations", "run_for_rules"]


@dataclass(frozen=True, slots=True)
class Run:
    """A network that was run.

    Attributes:
        outputs: in the graph's order.
        values: what rules read, by node; who is done with one takes it out.
        shapes: of every node's value, on the device meta.
    """

    outputs: Sequence[Tensor]
    values: dict[fx.Node, Any]
    shapes: Mapping[fx.Node, Any]


def find_activations(graph: Graph) -> set[fx.Node]:
    """Return what carries relevance: floats that are computed from the inputs, and not from integers alone.

    What integers among the inputs choose from constants (embeddings) does, too; a mask does not.
    """
    found, depending = set[fx.Node](), set[fx.Node]()
    for node in graph.nodes:
        if node.op == "placeholder":
            depending.add(node)
        reads = node.all_input_nodes
        if node.op == "call_function" and _tensors(node) and any(source in depending for source in reads):
            depending.add(node)
        if node in depending and _tensors(node)[0].is_floating_point():
            chosen = any(query.is_float(source) and source not in depending for source in reads)
            if node.op == "placeholder" or chosen or any(source in found for source in reads):
                found.add(node)
    return found


def run_for_rules(
    graph: Graph, inputs: Sequence[Tensor], activations: Collection[fx.Node], rules: Mapping[Any, Rule]
) -> Run:
    """Run a graph; what neither the rest of it nor a rule reads is let go.

    Raises:
        BadInput: an output is not finite.
    """
    needed = _read_by_rules(activations, rules) | set(graph.outputs)
    order = [node for node in graph.nodes if node.op != "output"]
    last = {source: node for node in order for source in node.all_input_nodes}
    values, shapes = dict[fx.Node, Any](zip(graph.inputs, inputs, strict=True)), dict[fx.Node, Any]()
    for node in order:
        if node.op == "get_attr":
            values[node] = query.constant(graph, node)
        elif node.op == "call_function":
            _, args, kwargs = arguments(node, values)
            values[node] = quickly(node, args, kwargs)
        shapes[node] = _shape(values[node])
        for source in node.all_input_nodes:
            if last[source] is node and source not in needed:
                values.pop(source, None)
    outputs = [values[node] for node in graph.outputs]
    _refuse_not_finite(outputs)
    return Run(outputs, values, shapes)


def _read_by_rules(activations: Collection[fx.Node], rules: Mapping[Any, Rule]) -> set[fx.Node]:
    found = set[fx.Node]()
    for node in activations:
        by_shape = isinstance(rules.get(node.target), ByShape)
        found.update(source for source in node.all_input_nodes if not (by_shape and source in activations))
    return found


def _tensors(node: fx.Node) -> list[Tensor]:
    """Return the fake values of a node that returns a tensor or several; of any other none."""
    value = metadata.value_of(node)
    found = value if isinstance(value, (list, tuple)) else [value]
    return [each for each in found if isinstance(each, torch.Tensor)]


def _shape(value: Any) -> Any:
    return torch.empty_like(value, device="meta") if isinstance(value, torch.Tensor) else None


def _refuse_not_finite(outputs: Sequence[Tensor]) -> None:
    if any(output.is_floating_point() and not bool(output.isfinite().all()) for output in outputs):
        raise BadInput(
            "an output of the model is not finite, so relevance has nothing to start from",
            expected="samples and weights that give numbers",
            hint="leave out the samples for which the model itself fails",
        )
