"""Puts integer operators in the place of floats, from the quantized inputs to the outputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Final

from torch import fx

from normfuse.graph import Graph, query
from normfuse.graph.edit import Editor, editing
from normfuse.graph.quantization import is_requested
from normfuse.graph.text import operator_name
from normfuse.integer.lowering import SIZE, Lowering, unsupported
from normfuse.integer.roles import is_view
from normfuse.integer.rules import RULES
from normfuse.kernels.integer_ops import (
    INT_LINEAR,
    INT_LINEAR_TABLE,
    INT_LINEAR_TOKENS,
    INT_LINEAR_TOKENS_TABLE,
    INT_TABLE,
    INTEGER_OPERATORS,
)
from normfuse.kernels.ops import DEQUANTIZE, QUANTIZE
from normfuse.pipeline import Fact, Pass
from normfuse.quant import DynamicParams, QuantParams, RoundedWeight
from normfuse.report import PassReport, Reason, Refusal

__all__ = ["LowerToIntegers"]

JOINED: Final = {INT_LINEAR: INT_LINEAR_TABLE, INT_LINEAR_TOKENS: INT_LINEAR_TOKENS_TABLE}
"""What a table becomes part of, and what they are together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LowerToIntegers(Pass):
    """Write every value that has a request as integers, computed from integers.

        before   y = request(gelu(request(linear(request(x), W, b))))
        after    y = int_linear_table(x, W, b, multiplier, table)

    1. A request's source and whatever is not rounded in front of it become one operator
       (``normfuse.integer.rules``), with scales as multipliers and shifts.
    2. Views move codes.
    3. Inputs are quantized first and outputs dequantized last; nothing else is float, but
    4. with ``allows_islands`` what has no integer form, between the values of codes and new codes.
    5. A table behind a linear map becomes part of it.

    Not exact: this is the arithmetic that ships. The graph then computes, bit for bit, what its ONNX file does.
    """

    name: ClassVar[str] = "lower-to-integers"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.PLACED})
    provides: ClassVar[frozenset[Fact]] = frozenset({Fact.QUANTIZED})

    activations: Mapping[str, QuantParams | DynamicParams]
    weights: Mapping[str, RoundedWeight]
    allows_islands: bool = False

    def run(self, graph: Graph) -> PassReport:
        """Edit the graph.

        Raises:
            UnsupportedModel: an operator has no integer form, or a sum could overflow, and it may not stay float; the
                message names the layer.
        """
        with editing(graph) as edit:
            lowering = Lowering(edit, self.activations, self.weights, RULES, self.allows_islands)
            lowering.run()
            edit.clean()
            _refuse_left_over(graph)
            for node in list(graph.nodes):
                if query.is_call(node, INT_TABLE):
                    _join(edit, node)
        names = {operator: name for name, operator in INTEGER_OPERATORS.items()}
        applied = [names[node.target] for node in graph.nodes if node.target in names]
        left = tuple(_left(node, lowering.islands) for node in graph.nodes if _computes_in_floats(node))
        return PassReport(name=self.name, applied=PassReport.count(applied), refused=left)


def _computes_in_floats(node: fx.Node) -> bool:
    is_ours = query.is_call(node, QUANTIZE, DEQUANTIZE) or node.op != "call_function" or is_view(node)
    return not is_ours and any(map(query.is_float, node.all_input_nodes)) and not query.is_call(node, SIZE)


def _left(node: fx.Node, reasons: Mapping[str, str]) -> Refusal:
    detail = reasons.get(node.name, operator_name(node.target))
    return Refusal(node.name, Reason.NO_INTEGER_FORM, detail, query.layer_of(node) or "")


def _refuse_left_over(graph: Graph) -> None:
    """Refuse what reads floats and makes none (comparisons, argmax), which nothing has written."""
    left = [node for node in graph.nodes if is_requested(node)]
    if left:  # those in front of the last are read on the way to it
        raise unsupported(query.readers(left[-1])[0])


def _join(edit: Editor, node: fx.Node) -> None:
    """Make a table part of the linear map in front of it (5)."""
    source, table = node.args
    assert isinstance(source, fx.Node)
    if query.is_call(source, *JOINED) and query.only_reader(source) is node:
        *given, minimum, maximum = source.args
        if (minimum, maximum) == (-128, 127):  # a bound in front of the table is lost in the joint operator
            tensors = [each for each in given if isinstance(each, fx.Node)]
            edit.replace(node, JOINED[source.target], *tensors, table, *given[len(tensors) :])
