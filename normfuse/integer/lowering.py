"""Writes an integer operator for every value that is rounded, from the codes of what it is computed of."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Final

import torch
from torch import Tensor, fx

from normfuse.errors import UnsupportedModel
from normfuse.graph import Graph, ops, query
from normfuse.graph.affine import AFFINE, Affine, read_affine
from normfuse.graph.edit import Editor
from normfuse.graph.quantization import is_requested
from normfuse.graph.text import operator_name
from normfuse.integer.roles import CLAMPS, is_view, viewed
from normfuse.integer.token_views import moved_factors
from normfuse.integer.written import Coded, Written
from normfuse.kernels.integer_ops import REQUANTIZE
from normfuse.kernels.ops import DEQUANTIZE, QUANTIZE
from normfuse.quant import DynamicParams, QuantParams, RoundedWeight
from normfuse.quant.dyadic import LARGEST_SHIFT, WIDE, Unwritable, dyadic, require_below

__all__ = ["SIZE", "Lowering", "Rule", "largest_code", "per_channel", "shared", "unsupported"]

Rule = Callable[["Lowering", fx.Node, Written], fx.Node]
"""Writes the codes of a node's value and returns their node."""

SIZE: Final = ops.ATEN.sym_size.int
ARGMAX: Final = ops.ATEN.argmax.default

LARGEST_BIAS: Final = 1 << 30

WIDE_CODES: Final = 32767

NARROW_CODES: Final = 127


@dataclass(slots=True)
class Lowering:
    """One graph on its way: what is codes already, and the constants that decide the rest.

    Attributes:
        edit: changes the graph.
        activations: scales and zero points, or that tokens find theirs, by the name of what is requested.
        weights: codes of weights, by the name of the linear map.
        rules: what writes an operator.
        allows_islands: whether what has no integer form stays float between codes; else it is refused.
        islands: why values stayed float, by the name of their node.
        factors: of codes with a scale per token, the factors that tokens have found.
        operands: the codes that products read of a node's value.
    """

    edit: Editor
    activations: Mapping[str, QuantParams | DynamicParams]
    weights: Mapping[str, RoundedWeight]
    rules: Mapping[Any, Rule]
    allows_islands: bool = False
    islands: dict[str, str] = field(default_factory=dict)
    factors: dict[fx.Node, fx.Node] = field(default_factory=dict)
    operands: dict[fx.Node, Coded] = field(default_factory=dict)
    _codes: dict[fx.Node, Coded] = field(default_factory=dict)

    @property
    def graph(self) -> Graph:
        """The graph that is changed."""
        return self.edit.graph

    def run(self) -> None:
        """Write integers in the place of all floats between inputs and outputs.

        Raises:
            UnsupportedModel: an operator has no integer form, and islands are not allowed.
        """
        for request in [node for node in self.graph.nodes if is_requested(node)]:
            params = self.activations[viewed(request).name]
            written = Written.of(params)
            is_input = viewed(request).op == "placeholder"
            node = self._quantized(request, params) if is_input else self._written(request, written, params)
            self._codes[request] = Coded(node, written.scale, written.zero_point, self.factors.get(node))
        for request in self._codes:
            if is_requested(request):  # a size is that of the float tensor
                self.edit.redirect(request, viewed(request), only=lambda reader: query.is_call(reader, SIZE))
        for node in [node for node in self.graph.nodes if query.is_call(node, ARGMAX)]:
            self._largest(node)
        (end,) = [node for node in self.graph.nodes if node.op == "output"]
        for output in dict.fromkeys(self.graph.outputs):
            if query.is_float(output) and (found := self._coded_or_island(output)) is not None:
                scale, zero = self._parameters(found, f"{output.name}_scale", output)
                values = self.edit.call(DEQUANTIZE, found.node, scale, zero, -1, at=end, like=output)
                self.edit.redirect(output, values, only=lambda reader: reader.op == "output")
        if self.allows_islands:
            self._read_floats()

    @contextmanager
    def _naming(self, node: fx.Node) -> Iterator[None]:
        """Name the layer of a constant that does not fit its bits."""
        try:
            yield
        except Unwritable as error:
            raise UnsupportedModel(
                str(error),
                where=self.layer(node),
                expected="scales whose ratios, and constants that, fit 32 bits",
                hint="--allow-float-islands leaves this in float between codes",
            ) from error

    def _largest(self, node: fx.Node) -> None:
        """Let a class map be found among codes: the largest value has the largest code."""
        if self.is_coded(viewed(node)):
            codes = self.coded(viewed(node)).node  # of 32 bits, because onnxruntime compares no int16
            self.edit.substitute(node, viewed(node), self.typed(codes, torch.int32))

    def _coded_or_island(self, output: fx.Node) -> Coded | None:
        """Return an output's codes; None where a view of it stays float."""
        try:
            with self._naming(output):
                return self.coded(output)
        except UnsupportedModel as refusal:
            if not self.allows_islands:
                raise
            self.islands[output.name] = refusal.what
            return None

    def _read_floats(self) -> None:
        """Let what stayed float read the values that codes stand for; what has been written is read no more.

        Codes are 16 bits wide there: onnxruntime 1.31 moves the dequantizer of int8 behind two views and then refuses
        its own types.
        """
        for request, found in [(request, found) for request, found in self.coded_requests() if request.users]:
            wide = replace(found, node=self.typed(found.node, torch.int16))
            scale, zero = self._parameters(wide, f"{request.name}_scale", request)
            values = self.edit.call(DEQUANTIZE, wide.node, scale, zero, -1, at=wide.node, after=True, like=request)
            self.edit.redirect(request, values)

    def typed(self, codes: fx.Node, kind: torch.dtype) -> fx.Node:
        """Return the same codes in another type."""
        if query.dtype(codes) is kind:
            return codes
        return self.edit.call(ops.ATEN._to_copy.default, codes, dtype=kind, at=codes, after=True)

    def coded_requests(self) -> list[tuple[fx.Node, Coded]]:
        """Return every request with its codes, in graph order."""
        return [(node, found) for node, found in self._codes.items() if is_requested(node)]

    def _written(self, request: fx.Node, written: Written, params: QuantParams | DynamicParams) -> fx.Node:
        try:
            with self._naming(viewed(request)):
                return self.write(request, written)
        except UnsupportedModel as refusal:
            if not self.allows_islands:
                raise
            self.islands[viewed(request).name] = refusal.what
            return self._quantized(request, params)

    def _quantized(self, request: fx.Node, params: QuantParams | DynamicParams) -> fx.Node:
        """Quantize a float: an input, or what has no integer form."""
        assert isinstance(params, QuantParams), "islands and codes per token are never asked for together"
        source = viewed(request)
        found = Coded(source, float(params.scale), int(params.zero_point))
        scale, zero = self._parameters(found, f"{source.name}_scale", source, params.stored_zero_point)
        limits = (params.type.minimum, params.type.maximum)
        return self.edit.call(QUANTIZE, source, scale, zero, -1, *limits, at=request, name=f"{source.name}_codes")

    def _parameters(
        self, found: Coded, name: str, like: fx.Node, zero_point: Tensor | None = None
    ) -> tuple[fx.Node, fx.Node]:
        value = query.dtype(found.node)
        zero = torch.tensor(found.zero_point, dtype=value) if zero_point is None else zero_point
        scale = torch.tensor(found.scale, dtype=torch.float32)
        return self.edit.constant(scale, name, like=like), self.edit.constant(zero, f"{name}_zero", like=like)

    def write(self, request: fx.Node, written: Written) -> fx.Node:
        """Write the codes that a request wants; what its source does not round is computed with it."""
        source = viewed(request)
        if query.is_call(source, *CLAMPS):
            written = written.clamped(*_bounds(source))
            source = source if self.is_coded(viewed(source)) else viewed(source)
        if query.is_call(source, AFFINE):
            written = written.behind(read_affine(self.graph, source))
            source = source if self.is_coded(viewed(source)) else viewed(source)
        if query.is_call(source, *CLAMPS, AFFINE):
            return self.requantize(source, self.coded(viewed(source)), written)
        if self.is_coded(source):
            return self.requantize(source, self.coded(source), written)
        rule = self.rules.get(source.target)
        if rule is None:
            raise unsupported(source)
        return rule(self, source, written)

    def is_coded(self, node: object) -> bool:
        """Return whether a node's value has codes, or is constant."""
        if not isinstance(node, fx.Node):
            return False
        return node in self._codes or query.is_constant(node) or (is_view(node) and self.is_coded(viewed(node)))

    def coded(self, node: fx.Node) -> Coded:
        """Return the codes of a node's value, seen through views.

        Raises:
            UnsupportedModel: it has none.
        """
        if node not in self._codes:
            if query.is_constant(node):
                self._codes[node] = self._constant(node)
            elif is_view(node):
                self._codes[node] = self._view(node)
            else:
                raise unsupported(node)
        return self._codes[node]

    def operand(self, node: fx.Node) -> Coded:
        """Return the codes of an operand of a product: 8 bits, of constants too, which have 16 elsewhere.

        Raises:
            UnsupportedModel: it has none.
        """
        if node not in self.operands:
            self.operands[node] = self._operand(node)
        return self.operands[node]

    def _operand(self, node: fx.Node) -> Coded:
        if query.is_constant(node):
            return self._constant(node, NARROW_CODES, torch.int8)
        if self._is_moved_constant(node):
            return self._moved(node, self.operand(viewed(node)))
        found = self.coded(node)
        if query.dtype(found.node) is torch.int8:
            return found
        written = Written(found.scale * WIDE_CODES / NARROW_CODES, 0, -NARROW_CODES, NARROW_CODES)  # rows of a table
        return Coded(self.requantize(found.node, found, written), written.scale, 0)

    def _is_moved_constant(self, node: fx.Node) -> bool:
        """Return whether a node only moves the numbers of a constant."""
        if query.is_constant(node):
            return True
        is_moved = is_view(node) and node.target not in self.rules and not query.is_call(node, ops.EMBEDDING)
        return is_moved and self._is_moved_constant(viewed(node))

    def _constant(self, node: fx.Node, largest: int = WIDE_CODES, kind: torch.dtype = torch.int16) -> Coded:
        values = query.constant(self.graph, node).double()
        scale = float(values.abs().max()) / largest or 1.0
        codes = torch.floor(values / scale + 0.5).to(kind)
        return Coded(self.edit.constant(codes, f"{node.name}_codes", like=node), scale, 0)

    def _view(self, node: fx.Node) -> Coded:
        if query.is_call(node, ops.EMBEDDING):
            return self._embedding(node)
        is_pool = query.is_call(node, *ops.MAXIMUM_POOLS)  # no runtime pools 16 bits
        return self._moved(node, (self.operand if is_pool else self.coded)(viewed(node)))

    def _moved(self, node: fx.Node, found: Coded) -> Coded:
        """Return the codes of a view, from those of what it looks at."""
        if (rule := self.rules.get(node.target)) is not None:
            written = Written(found.scale, found.zero_point, 0, 0)
            return Coded(rule(self, node, written), found.scale, found.zero_point)
        options = dict[str, Any](node.kwargs)
        view = self.edit.call(node.target, found.node, *node.args[1:], at=node, **options)
        if found.factors is None:
            return Coded(view, found.scale, found.zero_point)
        moved = moved_factors(node)
        assert moved is not None, "place-integers asks for codes per token where views keep tokens whole"
        factors = self.edit.call(node.target, found.factors, *moved, at=node, **options)
        return Coded(view, found.scale, found.zero_point, factors)

    def _embedding(self, node: fx.Node) -> Coded:
        """Look rows up in a table of 8-bit codes, with a scale for every channel, and bring them to 16 bits."""
        values = query.constant(self.graph, viewed(node)).double()
        scales = (values.abs().amax(0) / NARROW_CODES).clamp(min=torch.finfo(torch.float32).tiny)
        codes = torch.floor(values / scales + 0.5).to(torch.int8)
        table = self.edit.constant(codes, f"{viewed(node).target}_codes", like=node)
        rows = self.edit.call(node.target, table, *node.args[1:], at=node, **dict[str, Any](node.kwargs))
        whole = float(values.abs().max()) / WIDE_CODES or 1.0
        written = Written(whole, 0, -WIDE_CODES, WIDE_CODES, Affine(scales, torch.zeros_like(scales), -1))
        return Coded(self.requantize(node, Coded(rows, 1.0, 0), written), whole, 0)

    def requantize(self, at: fx.Node, found: Coded, written: Written) -> fx.Node:
        """Write codes at another scale, or at one for every channel."""
        rank, unit = query.rank(found.node), found.scale / written.scale
        affine = written.affine
        gain = affine.scale * unit
        multiplier, bias, shift = per_channel(gain, affine.shift / written.scale)
        bias = bias - found.zero_point
        largest = (largest_code(found.node) + float(bias.abs().max())) * float(multiplier.abs().max())
        require_below(largest, WIDE, what="a rescaled code", where=self.layer(at))
        behind = [1] * (rank - 1 - affine.axis % rank)
        constants = [
            self.constant(shared(vector).reshape(-1, *behind), f"{at.name}_{name}", at)
            for vector, name in ((bias, "bias"), (multiplier, "multiplier"))
        ]
        return self.edit.call(
            REQUANTIZE, found.node, *constants, shift, *written.ends(), at=at, after=True, name=f"{at.name}_codes"
        )

    def constant(self, tensor: Tensor, name: str, like: fx.Node) -> fx.Node:
        """Add an int32 constant.

        Raises:
            Unwritable: it does not fit.
        """
        limits = torch.iinfo(torch.int32)
        if int(tensor.max()) > limits.max or int(tensor.min()) < limits.min:
            raise Unwritable(f"{name} does not fit 32 bits")
        return self.edit.constant(tensor.to(torch.int32), name, like=like)

    def layer(self, node: fx.Node) -> str:
        """Return how messages call a node's layer."""
        return query.layer_of(node) or node.name


def per_channel(gain: Tensor, offset: Tensor, *, largest_shift: int = LARGEST_SHIFT) -> tuple[Tensor, Tensor, int]:
    """Return multipliers, biases in front of them, and a shift for ``gain x + offset`` in codes.

    A bias stands in front of its multiplier. Where the gain is so small beside the offset that it would not fit, the
    gain is raised to 2^-30 of the offset, which moves the result by less than |x| 2^-30 of the offset.
    """
    least = offset.abs() / LARGEST_BIAS
    raised = torch.where(gain.abs() < least, torch.where(gain < 0, -least, least), gain)
    multiplier, shift = dyadic(raised, largest_shift=largest_shift)
    exact = multiplier.double() * 2.0**-shift
    bias = torch.where(multiplier != 0, offset / torch.where(multiplier != 0, exact, 1.0), 0.0)
    return multiplier, torch.round(bias).clamp(-LARGEST_BIAS, LARGEST_BIAS).to(torch.int64), shift


def shared(vector: Tensor) -> Tensor:
    """Return one number where all channels have the same."""
    return vector[:1] if bool((vector == vector[:1]).all()) else vector


def largest_code(node: fx.Node) -> float:
    """Return the largest magnitude of a node's codes."""
    return float(torch.iinfo(query.dtype(node)).max + 1)


def _bounds(node: fx.Node) -> tuple[float, float]:
    if query.is_call(node, ops.ATEN.hardtanh.default):
        return float(query.argument(node, 1, "min_val", -1)), float(query.argument(node, 2, "max_val", 1))
    return 0.0, 6.0 if query.is_call(node, ops.ATEN.relu6.default) else math.inf


def unsupported(node: fx.Node) -> UnsupportedModel:
    """Return the refusal of an operator without an integer form."""
    called = query.operand(node, 0) if query.is_call(node, ops.GETITEM) else node
    return UnsupportedModel(
        f"{operator_name(called.target)} has no integer form",
        where=query.layer_of(node) or query.layer_of(called) or called.name,
        expected="operators that normfuse computes in integers",
        hint="--allow-float-islands leaves this in float between codes",
    )
