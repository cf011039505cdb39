"""Puts integer operators in the place of floats, from the quantized inputs to the outputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from normfuse.graph import Graph, query
from normfuse.graph.edit import Editor, editing
from normfuse.graph.quantization import is_requested
from normfuse.integer.lowering import Lowering, unsupported
from normfuse.integer.rules import RULES
from normfuse.kernels.integer_ops import INT_LINEAR, INT_LINEAR_TABLE, INT_TABLE, INTEGER_OPERATORS
from normfuse.pipeline import Fact, Pass
from normfuse.quant import QuantParams, RoundedWeight
from normfuse.report import PassReport

__all__ = ["LowerToIntegers"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LowerToIntegers(Pass):
    """Write every value that has a request as integers, computed from integers.

        before   y = request(gelu(request(linear(request(x), W, b))))
        after    y = int_linear_table(x, W, b, multiplier, table)

    1. A request's source and whatever is not rounded in front of it become one operator
       (``normfuse.integer.rules``), with scales as multipliers and shifts.
    2. Views move codes.
    3. Inputs are quantized first and outputs dequantized last; nothing else is float.
    4. A table behind a linear map becomes part of it.

    Not exact: this is the arithmetic that ships. The graph then computes, bit for bit, what its ONNX file does.
    """

    name: ClassVar[str] = "lower-to-integers"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.PLACED})
    provides: ClassVar[frozenset[Fact]] = frozenset({Fact.QUANTIZED})

    activations: Mapping[str, QuantParams]
    weights: Mapping[str, RoundedWeight]

    def run(self, graph: Graph) -> PassReport:
        """Edit the graph.

        Raises:
            UnsupportedModel: an operator has no integer form, or a sum could overflow; the message names the layer.
        """
        with editing(graph) as edit:
            Lowering(edit, self.activations, self.weights, RULES).run()
            edit.clean()
            _refuse_left_over(graph)
            for node in list(graph.nodes):
                if query.is_call(node, INT_TABLE):
                    _join(edit, node)
        names = {operator: name for name, operator in INTEGER_OPERATORS.items()}
        applied = [names[node.target] for node in graph.nodes if node.target in names]
        return PassReport(name=self.name, applied=PassReport.count(applied))


def _refuse_left_over(graph: Graph) -> None:
    """Refuse what reads floats and makes none (comparisons, argmax), which nothing has written."""
    left = [node for node in graph.nodes if is_requested(node)]
    if left:  # those in front of the last are read on the way to it
        raise unsupported(query.readers(left[-1])[0])


def _join(edit: Editor, node: fx.Node) -> None:
    """Make a table part of the linear map in front of it (4)."""
    source, table = node.args
    assert isinstance(source, fx.Node)
    if query.is_call(source, INT_LINEAR) and query.only_reader(source) is node:
        *operands, shift, zero_point, minimum, maximum = source.args
        if (minimum, maximum) == (-128, 127):  # a bound in front of the table is lost in the joint operator
            edit.replace(node, INT_LINEAR_TABLE, *operands, table, shift, zero_point)
