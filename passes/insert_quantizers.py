"""Puts quantizers where they were asked for and integer weights behind them; running the graph simulates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Final

import torch
from torch import Tensor, fx

from normfuse.graph import Graph, ops, query
from normfuse.graph.edit import Editor, editing
from normfuse.graph.quantization import QuantizationRequest, requested_weights, requests, withdraw_weight
from normfuse.kernels.ops import (
    DEQUANTIZE,
    DEQUANTIZE_LOGARITHM,
    GROUPED_LINEAR,
    QUANTIZE,
    QUANTIZE_FLOAT8,
    QUANTIZE_LOGARITHM,
    UNPACK,
)
from normfuse.pipeline import Fact, Pass
from normfuse.quant import (
    INT32,
    SMALLEST_SCALE,
    ActivationParams,
    DynamicParams,
    LogarithmicParams,
    PerChannel,
    PerGroup,
    QuantParams,
    RoundedWeight,
    quantize,
)
from normfuse.quant.float_type import FloatType
from normfuse.report import PassReport, Reason, Refusal

__all__ = ["InsertQuantizers"]

PER_TENSOR: Final = -1
MATRIX_RANK: Final = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class InsertQuantizers(Pass):
    """Write the chosen quantizers in the place of the requests, and weights as codes.

        before   y = linear(request(x), W, b)
        after    y = linear(dq(q(x)), dq(codes of W), b)

    1. Activations: one scale and zero point per tensor (0 is always exact); for products of two activations, where
       it was decided so, one per head, or codes on a logarithmic scale (which no engine runs). Where scales are
       dynamic no quantizer is written: the product of 3 makes the codes.
    2. Weights: codes per output channel, with zero points where it was decided so; biases: int32 codes at
       scale_x * scale_w; then a linear map is written on rows, the one form that onnxruntime runs in integers with
       its bias inside (a product and a sum fall back to float). Or floats, where the target takes no such codes.
    3. A map whose input stays float computes in float, with the values that its weight's codes stand for; where groups
       of them have their own scales, as one operator, because onnxruntime has a kernel for it.
    4. A tensor without parameters stays float, with a refusal; its request is withdrawn, its readers' weights stay.

    Not exact: this is where accuracy is spent. The graph's float operators then compute what integer kernels
    compute, up to float rounding.
    """

    name: ClassVar[str] = "insert-quantizers"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.PLACED})
    provides: ClassVar[frozenset[Fact]] = frozenset({Fact.QUANTIZED})

    activations: Mapping[str, ActivationParams]
    weights: Mapping[str, RoundedWeight]
    biases_stay_float: bool = False

    def run(self, graph: Graph) -> PassReport:
        """Edit the graph."""
        refused, applied = list[Refusal](), list[str]()
        scales: dict[fx.Node, Tensor] = {}
        withdrawn, rounding = set[fx.Node](), set[fx.Node]()
        with editing(graph) as edit:
            for request in requests(graph):
                if (params := self.activations.get(request.source.name)) is None:
                    refused.append(Refusal(request.source.name, Reason.NO_RANGE, layer=query.layer_of(request.source)))
                    applied.append("withdrawn")
                    withdrawn.update(request.readers)
                    edit.redirect(request.node, request.source)
                    continue
                if isinstance(params, DynamicParams):
                    applied.append("dynamic activation")
                    rounding.update(request.readers)
                    edit.redirect(request.node, request.source)
                    continue
                scales |= dict.fromkeys(request.readers, params.scale)
                if isinstance(params, LogarithmicParams):
                    _quantize_logarithm(edit, request, params)
                else:
                    _quantize_activation(edit, request, params)
                applied.append("activation")
            for node in requested_weights(graph):
                withdraw_weight(node)
                if (weight := self.weights.get(node.name)) is not None and node not in withdrawn:
                    self._quantize_weight(edit, node, weight, scales.get(node), rounds=node in rounding)
                    applied.append("weight")
        return PassReport(name=self.name, applied=PassReport.count(applied), refused=tuple(refused))

    def _quantize_weight(
        self, edit: Editor, node: fx.Node, weight: RoundedWeight, input_scale: Tensor | None, *, rounds: bool
    ) -> None:
        params, stem = weight.params, str(node.args[1].target)  # type: ignore[union-attr]
        given = query.argument(node, 2, "bias")
        bias_stem = str(given.target) if given is not None else f"{stem.rpartition('.')[0]}.bias".lstrip(".")
        if isinstance(params.granularity, PerGroup):
            _write_grouped(edit, node, weight, stem=stem, bias_stem=bias_stem, rounds=rounds)
            return
        if input_scale is None:
            edit.set_argument(node, 1, _unpacked(edit, node, weight, stem=stem))
            if weight.bias is not None:
                edit.set_constant(node, 2, weight.bias, bias_stem)
            return
        bias = self._bias(edit, node, weight, input_scale, bias_stem)
        if node.target is ops.LINEAR and not self.biases_stay_float:
            values = _values(edit, node, weight.codes.mT.contiguous(), params, axis=1, stem=stem)
            _write_linear(edit, node, values, bias)
            return
        edit.set_argument(node, 1, _values(edit, node, weight.codes, params, axis=0, stem=stem))
        if bias is not None:
            edit.set_argument(node, 2, bias)

    def _bias(
        self, edit: Editor, node: fx.Node, weight: RoundedWeight, input_scale: Tensor, stem: str
    ) -> fx.Node | None:
        if weight.bias is None:
            return None
        if self.biases_stay_float:
            return edit.constant(weight.bias, stem, like=node)
        params = _bias_params(weight.params, input_scale)
        return _values(edit, node, quantize(weight.bias, params), params, axis=0, stem=stem)


def _write_grouped(
    edit: Editor, node: fx.Node, weight: RoundedWeight, *, stem: str, bias_stem: str, rounds: bool
) -> None:
    """Write a product of floats and codes with a scale per group (3), a zero point too if one is not 0."""
    assert isinstance(weight.params.granularity, PerGroup)
    codes = edit.constant(weight.codes, f"{stem}_codes", like=node)
    scale = edit.constant(weight.params.scale, f"{stem}_scale", like=node)
    bias = None if weight.bias is None else edit.constant(weight.bias, bias_stem, like=node)
    zero = _zero_point(edit, node, weight.params, stem) if bool(weight.params.zero_point.any()) else None
    edit.replace(node, GROUPED_LINEAR, node.args[0], codes, scale, zero, bias, weight.params.granularity.size, rounds)


def _unpacked(edit: Editor, at: fx.Node, weight: RoundedWeight, *, stem: str) -> fx.Node:
    """Return a node with the values of a weight that meets float activations (3)."""
    data = edit.constant(weight.codes, f"{stem}_codes", like=at)
    scale = edit.constant(weight.params.scale, f"{stem}_scale", like=at)
    return edit.call(UNPACK, data, scale, at=at, name=f"{stem}_values")


def _quantize_activation(edit: Editor, request: QuantizationRequest, params: QuantParams) -> None:
    source, place, axis = request.source, request.node, _axis(params)
    scale = edit.constant(params.scale, f"{source.name}_scale", like=source)
    zero = _zero_point(edit, source, params, source.name)
    is_float = isinstance(request.type, FloatType)
    operator = QUANTIZE_FLOAT8 if is_float else QUANTIZE
    limits = () if is_float else (request.type.minimum, request.type.maximum)
    codes = edit.call(operator, source, scale, zero, axis, *limits, at=place, name=f"{source.name}_codes")
    values = edit.call(DEQUANTIZE, codes, scale, zero, axis, at=place, name=f"{source.name}_values")
    edit.redirect(place, values)


def _quantize_logarithm(edit: Editor, request: QuantizationRequest, params: LogarithmicParams) -> None:
    source, place, axis = request.source, request.node, _axis(params)
    scale = edit.constant(params.scale, f"{source.name}_scale", like=source)
    grid = (params.type.levels, params.per_octave, params.top_is_zero)
    codes = edit.call(QUANTIZE_LOGARITHM, source, scale, axis, *grid, at=place, name=f"{source.name}_codes")
    values = edit.call(DEQUANTIZE_LOGARITHM, codes, scale, axis, *grid, at=place, name=f"{source.name}_values")
    edit.redirect(place, values)


def _axis(params: QuantParams | LogarithmicParams) -> int:
    return params.granularity.axis if isinstance(params.granularity, PerChannel) else PER_TENSOR


def _zero_point(edit: Editor, at: fx.Node, params: QuantParams, stem: str) -> fx.Node:
    # Stored in the type of the codes, as ONNX wants it: then the file needs no cast.
    return edit.constant(params.stored_zero_point, f"{stem}_zero_point", like=at)


def _values(edit: Editor, at: fx.Node, codes: Tensor, params: QuantParams, *, axis: int, stem: str) -> fx.Node:
    """Return a node with the values of constant codes."""
    data = edit.constant(codes, f"{stem}_codes", like=at)
    scale = edit.constant(params.scale, f"{stem}_scale", like=at)
    return edit.call(DEQUANTIZE, data, scale, _zero_point(edit, at, params, stem), axis, at=at, name=f"{stem}_values")


def _bias_params(params: QuantParams, input_scale: Tensor) -> QuantParams:
    scale = (input_scale * params.scale).clamp(min=SMALLEST_SCALE)
    zero_point = torch.zeros_like(params.zero_point)
    return QuantParams(scale=scale, zero_point=zero_point, type=INT32, granularity=params.granularity)


def _write_linear(edit: Editor, node: fx.Node, weight: fx.Node, bias: fx.Node | None) -> None:
    """Write y = x W + b on rows: [tokens, in] x [in, out]; the codes are reshaped, not the floats (2)."""
    rows = node.args[0]
    assert isinstance(rows, fx.Node)
    is_matrix = query.rank(node) == MATRIX_RANK
    if not is_matrix:
        codes, scale, zero, axis = rows.args
        flat = edit.call(ops.RESHAPE, codes, [-1, query.shape(rows)[-1]], at=node)
        sizes = _sizes(edit, node, codes)  # type: ignore[arg-type]
        rows = edit.call(DEQUANTIZE, flat, scale, zero, axis, at=node)
    operands = (ops.ATEN.mm.default, rows, weight) if bias is None else (ops.ATEN.addmm.default, bias, rows, weight)
    product = edit.call(*operands, at=node, name=f"{node.name}_rows")
    if is_matrix:
        edit.redirect(node, product)
    else:
        edit.replace(node, ops.RESHAPE, product, sizes)


def _sizes(edit: Editor, node: fx.Node, codes: fx.Node) -> list[int | fx.Node]:
    """Return the shape of a linear map's output for a reshape; its leading axes are those of the codes."""
    sizes = query.shape(node)
    dynamic = [axis for axis, size in enumerate(sizes) if not isinstance(size, int)]
    if len(dynamic) == 1:  # the reshape finds out itself, and no size is computed at run time
        return [size if isinstance(size, int) else -1 for size in sizes]
    return [
        edit.call(ops.ATEN.sym_size.int, codes, axis, at=node) if axis in dynamic else int(size)
        for axis, size in enumerate(sizes)
    ]
