"""Rounds the weights of a block by their second-order error, map by map, behind what is quantized already."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from torch import Tensor, fx

from normfuse.graph import ops, query
from normfuse.graph.quantization import requested_weights
from normfuse.graph.segments import plainly
from normfuse.precision.block import Block
from normfuse.precision.decision import Quantization, input_scales
from normfuse.precision.simulation import Simulation
from normfuse.quant import (
    InputMoments,
    RoundedWeight,
    corrected_bias,
    refit_scale,
    round_by_coordinate_descent,
    round_by_gptq,
    shrink_drift,
    unfold_rows,
)
from normfuse.rewrite.linear_map import LinearMap, read_linear_map

__all__ = ["ErrorFeedback", "correct_biases", "feed_back_errors", "refit_affines"]


_Adjust = Callable[[LinearMap, RoundedWeight, InputMoments], RoundedWeight]


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorFeedback:
    """How weights are rounded: the parts that can be left out.

    ``asymmetric`` counts the error of quantized inputs too; ``descends`` improves the codes one by one afterwards.
    """

    asymmetric: bool = True
    descends: bool = True


def feed_back_errors(block: Block, decided: Quantization, chosen: ErrorFeedback) -> Quantization:
    """Return the decision with this block's weights rounded by GPTQ, each behind those before it."""
    for node, linear in _maps(block, decided).items():
        moments = _moments(block, decided, node, linear)
        if chosen.asymmetric:
            moments = shrink_drift(moments)
        start, wide = decided.weights[node.name], linear.weight
        codes = round_by_gptq(wide, start.params, moments, asymmetric_correction=chosen.asymmetric)
        if chosen.descends:
            codes = round_by_coordinate_descent(wide, start.params, moments, start=codes)
        decided = _with(decided, node, replace(start, codes=codes))
    return decided


def correct_biases(block: Block, decided: Quantization) -> Quantization:
    """Return the decision with biases that give every map of the block the mean output it has in float."""
    return _adjusted(block, decided, _corrected)


def refit_affines(block: Block, decided: Quantization) -> Quantization:
    """Return the decision with the scale and bias at which the codes of every output leave the least error.

    That is "QwT-v2" (2025) for every map: a ridge regression of the float outputs on the
    quantized ones, a factor and an offset per channel, taken into the dequantization. Maps without a bias get the
    factor alone.
    """
    return _adjusted(block, decided, _refitted)


def _adjusted(block: Block, decided: Quantization, adjust: _Adjust) -> Quantization:
    """Return the decision with every map of the block adjusted, where its bias still fits beside its codes."""
    scales = input_scales(block.graph, decided.activations)
    for node, linear in _maps(block, decided).items():
        adjusted = adjust(linear, decided.weights[node.name], _moments(block, decided, node, linear))
        if adjusted.holds_bias(scales[node]):
            decided = _with(decided, node, adjusted)
    return decided


def _corrected(linear: LinearMap, start: RoundedWeight, moments: InputMoments) -> RoundedWeight:
    if start.bias is None:
        return start
    means = {"mean_quantized": moments.mean_quantized, "mean_float": moments.mean_float}
    return replace(start, bias=corrected_bias(linear.bias, linear.weight, start.values, **means).float())


def _refitted(linear: LinearMap, start: RoundedWeight, moments: InputMoments) -> RoundedWeight:
    varying = shrink_drift(moments if start.bias is None else moments.centred())
    refitted = replace(start, params=refit_scale(linear.weight, start.codes, start.params, varying))
    return _corrected(linear, refitted, moments)


def _maps(block: Block, decided: Quantization) -> dict[fx.Node, LinearMap]:
    """Return the maps of the block whose weights are codes and whose inputs can be laid out as rows."""
    wanted = requested_weights(block.graph)
    nodes = [node for node in block.segment.nodes if node in wanted and node.name in decided.weights]
    found = ((node, read_linear_map(block.graph, node)) for node in nodes)
    return {node: linear for node, linear in found if linear is not None and not linear.is_transposed}


def _moments(block: Block, decided: Quantization, node: fx.Node, linear: LinearMap) -> InputMoments:
    moments, simulation = InputMoments(prod(linear.weight.shape[1:]), groups=linear.groups), Simulation(decided)
    for chunk in block.teaching:
        quantized = block.inputs_of(node, chunk, simulation, is_exact=False)
        exact = block.inputs_of(node, chunk, plainly, is_exact=True)
        moments.update(_rows(node, linear, quantized), _rows(node, linear, exact))
    return moments


def _rows(node: fx.Node, linear: LinearMap, x: Tensor) -> Tensor:
    """Return what the outputs of a map read, [rows, inputs], [groups, rows, inputs] with groups."""
    if node.target is ops.LINEAR:
        return x.reshape(-1, x.shape[-1])
    spatial = linear.weight.ndim - 2
    batched = x if x.ndim == spatial + 2 else x[None]
    return unfold_rows(
        batched,
        linear.weight.shape[2:],
        stride=_each(query.argument(node, 3, "stride", 1), spatial),
        padding=_each(query.argument(node, 4, "padding", 0), spatial),
        dilation=_each(query.argument(node, 5, "dilation", 1), spatial),
        groups=linear.groups,
    )


def _each(value: Any, count: int) -> list[int]:
    sizes = [int(size) for size in value] if isinstance(value, (list, tuple)) else [int(value)]
    return sizes * count if len(sizes) == 1 else sizes


def _with(decided: Quantization, node: fx.Node, weight: RoundedWeight) -> Quantization:
    return Quantization(activations=decided.activations, weights={**decided.weights, node.name: weight})
