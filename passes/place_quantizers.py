"""Asks for the quantizers that the target wants, and says what stays float and why."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from normfuse.graph import Graph, ops, query
from normfuse.graph.edit import editing
from normfuse.graph.metadata import value_of
from normfuse.graph.quantization import is_requested, request_quantization, request_weight
from normfuse.graph.text import operator_name
from normfuse.kernels.ops import DEQUANTIZE, GROUPED_LOOKUP, UNPACK
from normfuse.pipeline import Fact, Pass
from normfuse.quant.float_type import CodeType
from normfuse.quant.placement import Placement
from normfuse.report import PassReport, Reason, Refusal
from normfuse.rewrite.linear_map import read_linear_map

__all__ = ["PlaceQuantizers"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PlaceQuantizers(Pass):
    """Put a request on every tensor that the target wants quantized, in front of those who read the codes.

        before   y = linear(x, W, b)
        after    y = linear(request(x), W, b)

    1. Requested are the inputs of linear maps and convolutions that have constant weights, read a float32 tensor
       that is no constant, and sum up at least ``placement.smallest_inner`` products per output.
    2. Where the target says so, also what such convolutions write (behind their ReLU), and the sums of two such
       outputs, so that a residual CNN never leaves its codes. What no product reads of them has ``placement.written``.
       Or only what is added to a convolution's output, where the target makes one kernel of the two.
    3. Where the target says so, both operands of every product of two activations (attention's).
    4. What is an output of the model, or is read by a linear map that stays float, is left float by 2.
    5. Operators that normfuse does not know stay float and are named.
    6. Where scales of activations are dynamic, only the inputs of linear maps whose weights have groups are requested.

    The maps of 1 carry the type of their weights as a note; where activations stay float there is nothing else.
    Exact: a request passes its input on. Ranges come next, then quantizers in the place of the requests.
    """

    name: ClassVar[str] = "place-quantizers"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.FOLDED})
    provides: ClassVar[frozenset[Fact]] = frozenset({Fact.PLACED})

    placement: Placement

    def run(self, graph: Graph) -> PassReport:
        """Edit the graph."""
        refused = {node: found for node in graph.nodes if (found := self._refusal(graph, node)) is not None}
        wishes = _inputs(graph, refused)
        groups = {reader: self._group(reader) for wish in wishes for reader in wish.readers}
        for node, group in groups.items():
            request_weight(node, self.placement.weight, group=group, is_symmetric=self._is_symmetric(group))
        if self.placement.is_dynamic:
            self._request_dynamic(graph, groups)
        else:
            wishes += _operands(graph) if self.placement.attention_operands else []
            multiplied = {wish.source for wish in wishes}
            wishes += _outputs(graph, refused) if self.placement.convolution_outputs else []
            wishes += _skips(graph, refused) if self.placement.convolution_skips else []
            self._request_static(graph, wishes, multiplied)
        return PassReport(
            name=self.name, applied=PassReport.count(wish.rule for wish in wishes), refused=tuple(refused.values())
        )

    def _request_static(self, graph: Graph, wishes: Iterable[_Wish], multiplied: Collection[fx.Node]) -> None:
        if self.placement.activation is not None:
            symmetric = self.placement.symmetric_activations
            with editing(graph) as edit:
                for source, readers in _by_source(wishes).items():
                    type_ = self._type(source, source in multiplied) or self.placement.activation
                    request_quantization(edit, source, type_, readers, is_symmetric=symmetric)

    def _request_dynamic(self, graph: Graph, groups: Mapping[fx.Node, int | None]) -> None:
        """Let linear maps with groups read codes whose scales are found as the engine runs (6)."""
        assert self.placement.activation is not None
        readers: dict[tuple[fx.Node, int], list[fx.Node]] = {}
        for node, group in groups.items():
            if group is not None:
                readers.setdefault((_input(node), group), []).append(node)
        with editing(graph) as edit:
            for (source, group), nodes in readers.items():
                request_quantization(edit, source, self.placement.activation, nodes, group=group)

    def _is_symmetric(self, group: int | None) -> bool:
        """Return whether a map's zero points are 0: where floats meet a scale per channel there are none."""
        reads_floats = self.placement.activation is None or self.placement.is_dynamic
        return self.placement.weight_is_symmetric or (group is None and reads_floats)

    def _group(self, node: fx.Node) -> int | None:
        """Return how many inputs share a scale: a power of two that divides them, so that no group is cut short."""
        if node.target is not ops.LINEAR:
            return None
        return self.placement.group_of(query.shape(node.args[1])[-1])  # type: ignore[arg-type]

    def _type(self, source: fx.Node, is_multiplied: bool) -> CodeType | None:
        """Return the codes that a tensor gets in place of those of activations."""
        if source.op == "placeholder":
            return self.placement.model_input
        return None if is_multiplied else self.placement.written

    def _refusal(self, graph: Graph, node: fx.Node) -> Refusal | None:
        """Return why ``node`` computes floats (1, 5), or None."""
        if not _is_linear_map(node):
            return _unknown(node)
        layer, source, linear = query.layer_of(node), _input(node), read_linear_map(graph, node)
        if linear is None:
            return Refusal(node.name, Reason.NOT_CONSTANT, "its weight", layer)
        if query.is_constant(source):
            return Refusal(node.name, Reason.NO_RANGE, "its input is a constant", layer)
        if query.dtype(source) is not torch.float32:
            return Refusal(node.name, Reason.UNSUPPORTED_TYPE, str(query.dtype(source)), layer)
        if node.target is not ops.LINEAR and not self.placement.quantized_convolutions:
            return Refusal(node.name, Reason.NO_KERNEL, "a convolution of 8-bit floats", layer)
        inner = linear.weight[0].numel()
        if inner < self.placement.smallest_inner:
            return Refusal(node.name, Reason.TOO_SMALL, f"{inner} inputs per output", layer)
        return None


@dataclass(frozen=True, slots=True)
class _Wish:
    """Who shall read the codes of a tensor, and by which rule."""

    rule: str
    source: fx.Node
    readers: tuple[fx.Node, ...]


def _inputs(graph: Graph, refused: Collection[fx.Node]) -> list[_Wish]:
    """Return what linear maps read (1) and is not requested yet."""
    return [
        _Wish("linear" if node.target is ops.LINEAR else "convolution", _input(node), (node,))
        for node in graph.nodes
        if _is_linear_map(node) and node not in refused and not is_requested(_input(node))
    ]


def _operands(graph: Graph) -> list[_Wish]:
    """Return what products of two activations read (3)."""
    products = (node for node in graph.nodes if query.is_call(node, ops.MATMUL))
    pairs = ((source, node) for node in products for source in node.args[:2] if isinstance(source, fx.Node))
    return [
        _Wish("operand", source, (node,))
        for source, node in pairs
        if not query.is_constant(source) and not is_requested(source) and query.dtype(source) is torch.float32
    ]


def _outputs(graph: Graph, refused: Collection[fx.Node]) -> list[_Wish]:
    """Return what convolutions and sums behind them write (2, 4) and is not requested yet."""
    wishes, written = list[_Wish](), set[fx.Node]()
    for node in graph.nodes:
        is_convolution = query.is_call(node, *ops.CONVOLUTIONS) and node not in refused
        is_sum = query.is_call(node, ops.ADD) and all(_behind_request(value) in written for value in node.args[:2])
        if not (is_convolution or is_sum):
            continue
        value = _behind_relu(node)
        readers = query.readers(value)
        if any(reader.op == "output" or (_is_linear_map(reader) and reader in refused) for reader in readers):
            continue
        written.add(value)
        if new := tuple(reader for reader in readers if not is_requested(reader)):
            wishes.append(_Wish("sum" if is_sum else "convolution-output", value, new))
    return wishes


def _skips(graph: Graph, refused: Collection[fx.Node]) -> list[_Wish]:
    """Return what is added to a convolution's output (2) and not requested yet; of two such outputs, the second."""
    wishes = []
    for node in graph.nodes:
        if not query.is_call(node, ops.ADD):
            continue
        made = [query.is_call(value, *ops.CONVOLUTIONS) and value not in refused for value in node.args[:2]]
        skip = node.args[1] if made[0] else node.args[0] if any(made) else None
        if not isinstance(skip, fx.Node) or query.is_constant(skip) or is_requested(skip):
            continue
        if query.dtype(skip) is torch.float32:
            wishes.append(_Wish("skip", skip, (node,)))
    return wishes


def _by_source(wishes: Iterable[_Wish]) -> dict[fx.Node, set[fx.Node]]:
    readers: dict[fx.Node, set[fx.Node]] = {}
    for wish in wishes:
        readers.setdefault(wish.source, set()).update(wish.readers)
    return readers


def _is_linear_map(node: fx.Node) -> bool:
    return query.is_call(node, ops.LINEAR, *ops.CONVOLUTIONS)


def _input(node: fx.Node) -> fx.Node:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    return source


def _behind_request(value: object) -> object:
    return _input(value) if isinstance(value, fx.Node) and is_requested(value) else value


def _behind_relu(node: fx.Node) -> fx.Node:
    reader = query.only_reader(node)
    return reader if reader is not None and query.is_call(reader, ops.RELU) else node


def _unknown(node: fx.Node) -> Refusal | None:
    """Return a refusal for a call that computes floats in a way that normfuse has no integer form for (5)."""
    if node.op != "call_function" or node.target in ops.KNOWN or is_requested(node) or not _makes_floats(node):
        return None
    if query.is_call(node, DEQUANTIZE, GROUPED_LOOKUP, UNPACK):  # a table, which is held as codes already
        return None
    return Refusal(node.name, Reason.UNKNOWN_OPERATOR, operator_name(node.target), query.layer_of(node))


def _makes_floats(node: fx.Node) -> bool:
    value = value_of(node)
    results = value if isinstance(value, (list, tuple)) else (value,)
    return any(isinstance(result, torch.Tensor) and result.is_floating_point() for result in results)
