"""Puts quantizers where they were asked for and integer weights behind them; running the graph simulates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Final

import torch
from torch import Tensor, fx

from normfuse.graph import Graph, ops, query
from normfuse.graph.edit import Editor, editing
from normfuse.graph.quantization import QuantizationRequest, requests
from normfuse.kernels.ops import DEQUANTIZE, QUANTIZE
from normfuse.pipeline import Fact, Pass
from normfuse.quant import INT32, IntegerType, QuantParams, Range, asymmetric, quantize, weight_params
from normfuse.report import PassReport, Reason, Refusal
from normfuse.rewrite.linear_map import LinearMap, read_linear_map

__all__ = ["InsertQuantizers"]

PER_TENSOR: Final = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class InsertQuantizers(Pass):
    """Quantize the requested activations and the weights of the linear maps that read them.

        before   y = linear(x, W, b)
        after    y = linear(dq(q(x)), dq(codes of W), b)

    1. Activations: one scale and zero point per tensor, from the observed ranges (0 is always exact).
    2. Weights: symmetric codes per output channel. A linear becomes a product with the transposed weight and
       a sum, as engines fuse it; a convolution's bias becomes int32 codes at scale_x * scale_w.
    3. A tensor without a range stays float, with a refusal.

    Not exact: this is where accuracy is spent. The graph's float operators then compute what integer kernels
    compute, up to float rounding.
    """

    name: ClassVar[str] = "insert-quantizers"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.PLACED})
    provides: ClassVar[frozenset[Fact]] = frozenset({Fact.QUANTIZED})

    ranges: Mapping[str, Range]
    weight: IntegerType

    def run(self, graph: Graph) -> PassReport:
        """Edit the graph."""
        refused: list[Refusal] = []
        activations = weights = 0
        with editing(graph) as edit:
            for node, request in list(requests(graph)):
                if (found := self.ranges.get(node.name)) is None:
                    refused.append(Refusal(node.name, Reason.NO_RANGE, layer=query.layer_of(node)))
                    continue
                _quantize_activation(edit, node, request, asymmetric(found.minimum, found.maximum, request.type))
                activations += 1
            for node in list(graph.nodes):
                linear = read_linear_map(graph, node)
                if linear is not None and query.is_call(node.args[0], DEQUANTIZE):
                    self._quantize_weight(edit, node, linear)
                    weights += 1
        return PassReport(
            name=self.name, applied={"activation": activations, "weight": weights}, refused=tuple(refused)
        )

    def _quantize_weight(self, edit: Editor, node: fx.Node, linear: LinearMap) -> None:
        params = weight_params(linear.weight, 0, self.weight)
        codes = quantize(linear.weight, params)
        if node.target is ops.LINEAR:
            _write_product(edit, node, linear, codes, params)
        else:
            _write_convolution(edit, node, linear, codes, params)


def _quantize_activation(edit: Editor, node: fx.Node, request: QuantizationRequest, params: QuantParams) -> None:
    scale = edit.constant(params.scale, f"{node.name}_scale", like=node)
    zero = edit.constant(params.zero_point, f"{node.name}_zero_point", like=node)
    limits = (request.type.minimum, request.type.maximum)
    codes = edit.call(QUANTIZE, node, scale, zero, PER_TENSOR, *limits, at=node, after=True, name=f"{node.name}_codes")
    values = edit.call(DEQUANTIZE, codes, scale, zero, PER_TENSOR, at=codes, after=True, name=f"{node.name}_values")
    edit.redirect(node, values, only=lambda reader: reader.name in request.readers)


def _weight_node(edit: Editor, at: fx.Node, codes: Tensor, scale: Tensor, axis: int, stem: str) -> fx.Node:
    data = edit.constant(codes, f"{stem}_codes", like=at)
    scales = edit.constant(scale, f"{stem}_scale", like=at)
    zeros = edit.constant(torch.zeros(scale.shape, dtype=torch.int32), f"{stem}_zero_point", like=at)
    return edit.call(DEQUANTIZE, data, scales, zeros, axis, at=at)


def _write_product(edit: Editor, node: fx.Node, linear: LinearMap, codes: Tensor, params: QuantParams) -> None:
    stem = str(node.args[1].target)  # type: ignore[union-attr]
    weight = _weight_node(edit, node, codes.mT.contiguous(), params.scale, 1, stem)
    product = edit.call(ops.MATMUL, node.args[0], weight, at=node, name=f"{node.name}_product")
    if linear.bias is None:
        edit.redirect(node, product)
    else:
        edit.replace(node, ops.ADD, product, node.args[2])


def _write_convolution(edit: Editor, node: fx.Node, linear: LinearMap, codes: Tensor, params: QuantParams) -> None:
    stem = str(node.args[1].target)  # type: ignore[union-attr]
    edit.set_argument(node, 1, _weight_node(edit, node, codes, params.scale, 0, stem))
    if linear.bias is None:
        return
    input_scale = query.constant(edit.graph, node.args[0].args[1])  # type: ignore[union-attr, arg-type]
    scale = (input_scale.double() * params.scale.double()).float()
    bias = QuantParams(scale, torch.zeros(scale.shape, dtype=torch.int32), INT32, params.granularity)
    bias_stem = str(query.argument(node, 2, "bias").target)
    edit.set_argument(node, 2, _weight_node(edit, node, quantize(linear.bias, bias), scale, 0, bias_stem))
