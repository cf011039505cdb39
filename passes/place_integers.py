"""Asks for codes wherever an integer network rounds: 8 bits for operands of products, 16 for the rest."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Final

from torch import fx

from normfuse.graph import Graph, ops, query
from normfuse.graph.edit import Editor, editing
from normfuse.graph.quantization import is_requested, request_quantization, request_weight
from normfuse.integer.gelu import request_form
from normfuse.integer.roles import POINTWISE, PRODUCTS, absorbed, attention_scores, is_view
from normfuse.integer.tokens import request_tokens, why_not_by_token
from normfuse.pipeline import Fact, Pass
from normfuse.quant.integer_forms import GeluForm, NormForm, SoftmaxForm
from normfuse.quant.integer_type import INT8, INT8_NARROW, INT16, IntegerType
from normfuse.report import PassReport, Reason, Refusal

__all__ = ["PlaceIntegers"]

POOLS: Final = frozenset(ops.MAXIMUM_POOLS)

MEETING: Final = frozenset({ops.MATMUL, ops.ATTENTION})
"""Where two activations meet."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlaceIntegers(Pass):
    """Put a request behind everything that rounds, for those who read it.

        before   y = linear(norm(x + f), W, b)
        after    y = linear(request8(norm(request16(x + f))), W, b)

    1. Operands of products and of tables of functions are 8 bits wide; with zero points, but not where two
       activations meet. So is what maximum pooling reads: no runtime pools 16 bits.
    2. Everything else (sums, norms, means, what is concatenated, outputs) is 16 bits wide and has none.
    3. What both kinds read is 16 bits wide, and 8 bits are made of it in front of the products.
    4. What is part of a larger operator is not rounded (``normfuse.integer.roles``).
    5. In front of forms by shifts codes are 8 bits wide and have no zero points, as published: scores of attention
       for shiftmax, which are no part of a larger operator then, and what such a GELU reads.
    6. Norms per token: what only linear maps read of one has 8 bits at a scale of each token; other norms are named.

    Exact: a request passes its input on. Ranges come next, then integers in the place of everything.
    """

    name: ClassVar[str] = "place-integers"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.FOLDED})
    provides: ClassVar[frozenset[Fact]] = frozenset({Fact.PLACED})

    weight: IntegerType = INT8_NARROW
    """Codes of weights, per output channel."""
    norm: NormForm = NormForm.PER_TENSOR
    softmax: SoftmaxForm = SoftmaxForm.TABLE
    gelu: GeluForm = GeluForm.TABLE

    def run(self, graph: Graph) -> PassReport:
        """Edit the graph."""
        scores = attention_scores(graph) if self.softmax is SoftmaxForm.SHIFTMAX else set[fx.Node]()
        symmetric = MEETING if self.gelu is GeluForm.TABLE else MEETING | {ops.GELU}
        never, applied = absorbed(graph) - scores, list[str]()
        refused = self._refused(graph, never)
        for node in graph.nodes:
            if query.is_call(node, *PRODUCTS) and query.is_constant(node.args[1]):
                request_weight(node, self.weight)
            if query.is_call(node, ops.GELU):
                request_form(node, self.gelu)
        with editing(graph) as edit:
            for node in list(graph.nodes):
                if node in scores:
                    request_quantization(edit, node, INT8_NARROW, query.readers(node), is_symmetric=True)
                    applied.append("8 bits")
                elif self._is_by_token(node) and node not in refused:
                    request_tokens(edit, node)
                    applied.append("8 bits per token")
                elif _rounds(node) and node not in never:
                    applied += _request(edit, node, symmetric)
        return PassReport(name=self.name, applied=PassReport.count(applied), refused=tuple(refused.values()))

    def _is_by_token(self, node: fx.Node) -> bool:
        return self.norm is NormForm.PER_TOKEN and query.is_call(node, ops.LAYER_NORM, ops.RMS_NORM)

    def _refused(self, graph: Graph, never: Collection[fx.Node]) -> dict[fx.Node, Refusal]:
        """Return the norms that keep codes per tensor although others were asked for, and why (6)."""
        found = {node: why_not_by_token(node, never) for node in graph.nodes if self._is_by_token(node)}
        return {
            node: Refusal(node.name, Reason.NOT_BY_TOKEN, why, query.layer_of(node) or "")
            for node, why in found.items()
            if why
        }


def _rounds(node: fx.Node) -> bool:
    """Return whether a node makes floats that no other node of the network has made."""
    is_made = node.op in ("placeholder", "call_function") and query.is_float(node)
    return is_made and not is_view(node) and not is_requested(node)


def _request(edit: Editor, node: fx.Node, symmetric: Collection[Any]) -> list[str]:
    """Ask for the codes of what rounds, wherever they are read; some operators read symmetric ones."""
    uses = list(_uses(node, symmetric))
    narrow = [use for use in uses if use.is_operand]
    if len(narrow) == len(uses):
        is_symmetric = any(use.is_symmetric for use in narrow)
        request_quantization(edit, node, _narrow(is_symmetric), query.readers(node), is_symmetric=is_symmetric)
        return ["8 bits"]
    request_quantization(edit, node, INT16, query.readers(node), is_symmetric=True)
    wide = next(reader for reader in query.readers(node) if is_requested(reader))
    for source in dict.fromkeys(use.read for use in narrow):
        readers = [use.reader for use in narrow if use.read is source]
        is_symmetric = any(use.is_symmetric for use in narrow if use.read is source)
        place = wide if source is node else source
        request_quantization(edit, place, _narrow(is_symmetric), readers, is_symmetric=is_symmetric)
    return ["16 bits", *["8 bits of 16"] * bool(narrow)]


def _narrow(is_symmetric: bool) -> IntegerType:
    return INT8_NARROW if is_symmetric else INT8


@dataclass(frozen=True, slots=True)
class _Use:
    """A reader of a tensor, or of a view of it (``read``), and which operators read symmetric codes."""

    read: fx.Node
    reader: fx.Node
    symmetric: Collection[Any]

    @property
    def is_operand(self) -> bool:
        """Whether 8 bits are read."""
        is_first = self.reader.args[:1] == (self.read,)
        return self.is_symmetric or (is_first and query.is_call(self.reader, *PRODUCTS, *POINTWISE, *POOLS))

    @property
    def is_symmetric(self) -> bool:
        """Whether symmetric codes are read, at once or of what is pooled; there a mean square counts, too."""
        if query.is_call(self.reader, *POOLS):
            uses = _uses(self.reader, self.symmetric)
            return any(use.is_symmetric or query.is_call(use.reader, ops.RMS_NORM) for use in uses)
        return query.is_call(self.reader, *self.symmetric)


def _uses(node: fx.Node, symmetric: Collection[Any]) -> Iterator[_Use]:
    for reader in query.readers(node):
        if is_view(reader) and not query.is_call(reader, *POOLS):
            yield from _uses(reader, symmetric)
        elif not query.is_call(reader, ops.ATEN.sym_size.int):  # a size is no value
            yield _Use(node, reader, symmetric)
