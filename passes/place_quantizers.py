"""Asks for the quantizers that the target wants, and says what stays float and why."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from normfuse.graph import Graph, ops, query
from normfuse.graph.quantization import request_quantization, requested
from normfuse.graph.text import operator_name
from normfuse.pipeline import Fact, Pass
from normfuse.quant.placement import Placement
from normfuse.report import PassReport, Reason, Refusal
from normfuse.rewrite.linear_map import read_linear_map

__all__ = ["PlaceQuantizers"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PlaceQuantizers(Pass):
    """Note on every tensor that the target wants quantized its type and who reads the codes.

    1. The inputs of linear maps and convolutions with constant weights.
    2. Where the target says so, both inputs of attention's two products.
    3. Where the target says so, the outputs of convolutions (behind their ReLU), and the sums of two such
       outputs, so that a residual CNN never leaves its codes.
    4. Norms, softmax and GELU are never cut apart.

    Nothing is computed differently yet: ranges come first.
    """

    name: ClassVar[str] = "place-quantizers"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.FOLDED})
    provides: ClassVar[frozenset[Fact]] = frozenset({Fact.PLACED})

    placement: Placement

    def run(self, graph: Graph) -> PassReport:
        """Annotate the graph."""
        refused: list[Refusal] = []
        counts = {"linear": 0, "convolution": 0, "attention-product": 0, "sum": 0}
        for node in graph.nodes:
            kind = self._kind(node)
            if kind is None:
                refused += _unknown(node)
                continue
            if (refusal := self._too_small(graph, node)) is not None:
                refused.append(refusal)
                continue
            for value in self._inputs(node):
                request_quantization(value, self.placement.activation, frozenset({node.name}))
            counts[kind] += 1
        if self.placement.convolution_outputs:
            counts["sum"] = self._close_convolutions(graph)
        return PassReport(
            name=self.name,
            applied={rule: count for rule, count in counts.items() if count},
            refused=tuple(refused),
        )

    def _kind(self, node: fx.Node) -> str | None:
        if query.is_call(node, ops.LINEAR):
            return "linear"
        if query.is_call(node, *ops.CONVOLUTIONS):
            return "convolution"
        if query.is_call(node, ops.MATMUL) and self.placement.attention_products:
            return "attention-product"
        return None

    def _inputs(self, node: fx.Node) -> Iterator[fx.Node]:
        operands = node.args[:2] if node.target is ops.MATMUL else node.args[:1]
        return (value for value in operands if isinstance(value, fx.Node))

    def _too_small(self, graph: Graph, node: fx.Node) -> Refusal | None:
        if node.target is ops.MATMUL:
            return None
        layer = query.layer_of(node)
        linear = read_linear_map(graph, node)
        if linear is None:
            return Refusal(node.name, Reason.NOT_CONSTANT, "its weight", layer)
        if not query.dtype(node).is_floating_point:
            return Refusal(node.name, Reason.UNSUPPORTED_TYPE, str(query.dtype(node)), layer)
        inner = linear.weight[0].numel()
        if inner < self.placement.smallest_inner:
            return Refusal(node.name, Reason.TOO_SMALL, f"{inner} inputs per output", layer)
        return None

    def _close_convolutions(self, graph: Graph) -> int:
        """Request what convolutions write, and the sums of what they write; return the number of sums."""
        sums = 0
        written: set[fx.Node] = set()
        for node in graph.nodes:
            is_convolution = query.is_call(node, *ops.CONVOLUTIONS) and requested(_input(node)) is not None
            is_sum = query.is_call(node, ops.ADD) and all(value in written for value in node.args[:2])
            if not (is_convolution or is_sum):
                continue
            sums += is_sum
            value = _behind_relu(node)
            inner = [reader for reader in query.readers(value) if reader.op != "output"]
            if len(inner) == len(query.readers(value)):
                written.add(value)
                request_quantization(value, self.placement.activation, frozenset(reader.name for reader in inner))
        return sums


def _input(node: fx.Node) -> fx.Node:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    return source


def _behind_relu(node: fx.Node) -> fx.Node:
    reader = query.only_reader(node)
    return reader if reader is not None and query.is_call(reader, ops.RELU) else node


def _unknown(node: fx.Node) -> list[Refusal]:
    """Return a refusal for a call that computes floats in a way that normfuse has no integer form for."""
    is_float_call = node.op == "call_function" and query.is_tensor(node) and query.dtype(node).is_floating_point
    if not is_float_call or node.target in ops.KNOWN:
        return []
    return [Refusal(node.name, Reason.UNKNOWN_OPERATOR, operator_name(node.target), query.layer_of(node))]
