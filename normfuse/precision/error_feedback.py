"""Rounds the weights of a block by their second-order error, map by map, behind what is quantized already."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from torch import Tensor, fx

from normfuse.graph import ops, query
from normfuse.graph.quantization import requested_weights
from normfuse.graph.quickly import quickly
from normfuse.heap import give_back_memory
from normfuse.precision.block import Block
from normfuse.precision.decision import Quantization, input_scales
from normfuse.precision.simulation import Simulation, call_with
from normfuse.precision.whereabouts import not_finite
from normfuse.quant import (
    InputMeans,
    InputMoments,
    OutputSums,
    QuantParams,
    RoundingProblem,
    corrected_bias,
    descended,
    gptq_codes,
    shrink_drift,
    unfold_rows,
)
from normfuse.rewrite.linear_map import LinearMap, read_linear_map

__all__ = ["ErrorFeedback", "correct_biases", "feed_back_errors", "refit_affines"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorFeedback:
    """How weights are rounded: the parts that can be left out.

    ``asymmetric`` counts the error of quantized inputs too (GPTAQ, Li et al., 2025, arXiv 2504.02692); ``descends``
    improves the codes one by one afterwards.
    """

    asymmetric: bool = False
    descends: bool = True


def feed_back_errors(block: Block, decided: Quantization, chosen: ErrorFeedback) -> Quantization:
    """Return the decision with this block's weights rounded by GPTQ, each behind those before it.

    Args:
        block: transposed convolutions in it are left as they are.
        decided: where scales and zero points come from, and the codes of all that stands before; biases stay.
        chosen: the parts that are on.

    Raises:
        BadInput: what a map reads is not finite; the message names layer and sample.
    """
    for node, linear in _maps(block, decided).items():
        start, wide = decided.weights[node.name], linear.weight
        codes = _rounded(_problem(block, decided, node, linear, chosen), descends=chosen.descends)
        codes = codes.reshape(wide.shape).to(wide.device)
        decided = decided.changed(weights={node.name: replace(start, codes=codes)})
        give_back_memory()
    return decided


def _problem(
    block: Block, decided: Quantization, node: fx.Node, linear: LinearMap, chosen: ErrorFeedback
) -> RoundingProblem:
    """Return what the codes should solve. The drift, as large as H, is summed up only where it is asked for."""
    moments = InputMoments(prod(linear.weight.shape[1:]), groups=linear.groups)
    if chosen.asymmetric:
        _watch_inputs(moments, block, decided, node, linear)
    else:
        for rows in _rows_read(block, decided, node, linear, is_exact=False):
            moments.update(rows)
    give_back_memory()
    if chosen.asymmetric:
        moments = shrink_drift(moments)
    params = decided.weights[node.name].params
    return RoundingProblem.of(linear.weight, params, moments, asymmetric_correction=chosen.asymmetric)


def _rounded(problem: RoundingProblem, *, descends: bool) -> Tensor:
    give_back_memory()
    codes = gptq_codes(problem)
    give_back_memory()  # between the two, rows of float64 are left in the heap's gaps
    return descended(problem, codes) if descends else codes


def correct_biases(block: Block, decided: Quantization) -> Quantization:
    """Return the decision with biases that give every map of the block the mean output it has in float.

    Nagel et al., 2019, arXiv 1906.04721, section 4.2, on data. Maps without a bias stay as they are, and so does a bias
    that would not fit an int32 any more.

    Raises:
        BadInput: what a map reads is not finite; the message names layer and sample.
    """
    scales = input_scales(block.graph, decided.activations)
    for node, linear in _maps(block, decided).items():
        start = decided.weights[node.name]
        if start.bias is None:
            continue
        means = InputMeans(prod(linear.weight.shape[1:]), groups=linear.groups)
        _watch_inputs(means, block, decided, node, linear)
        both = {"mean_quantized": means.mean_quantized, "mean_float": means.mean_float}
        bias = corrected_bias(linear.bias, linear.weight, start.values, **both).float()
        corrected = replace(start, bias=bias)
        if corrected.holds_bias(scales[node]):
            decided = decided.changed(weights={node.name: corrected})
    return decided


def refit_affines(block: Block, decided: Quantization) -> Quantization:
    """Return the decision with the scale and bias at which the codes of every output leave the least error.

    That is "QwT-v2" (Tang et al., 2025, arXiv 2505.20932) for every map in place of a block: a regression of the float
    outputs on the quantized ones, a factor and an offset per channel, taken into the dequantization. Maps without a
    bias get the factor alone; where the new bias would not fit an int32 the map stays as it is.
    """
    scales = input_scales(block.graph, decided.activations)
    for node in _maps(block, decided):
        start = decided.weights[node.name]
        factor, offset = _outputs(block, decided, node).regression(through_zero=start.bias is None)
        params = replace(start.params, scale=_per_output(start.params, factor) * start.params.scale)
        refitted = replace(start, params=params, bias=None if start.bias is None else offset.float())
        if refitted.holds_bias(scales[node]):
            decided = decided.changed(weights={node.name: refitted})
    return decided


def _outputs(block: Block, decided: Quantization, node: fx.Node) -> OutputSums:
    """Return what one map makes of all chunks that teach, quantized (without its bias) and in float."""
    simulation, weight = Simulation(decided), decided.weights[node.name].values
    linear = read_linear_map(block.graph, node)
    assert linear is not None
    sums, axis = OutputSums(len(linear.weight)), -1 if node.target is ops.LINEAR else -(linear.weight.ndim - 1)
    rest = (None, None, *node.args[3:])
    for chunk in block.split.teaching:
        x = block.inputs_of(node, chunk, simulation, is_exact=False)
        quantized = call_with(node, (x, *rest), node.kwargs, weight, None)
        x = block.inputs_of(node, chunk, quickly, is_exact=True)
        wanted = call_with(node, (x, *rest), node.kwargs, linear.weight, linear.bias)
        sums.update(quantized.movedim(axis, -1), wanted.movedim(axis, -1))
        del x, quantized, wanted
        give_back_memory()
    return sums


def _per_output(params: QuantParams, factor: Tensor) -> Tensor:
    """Return a factor for every output beside the scales, in their type."""
    scale = params.scale
    return factor.to(scale).reshape(-1, *[1] * (scale.ndim - 1))


def _maps(block: Block, decided: Quantization) -> dict[fx.Node, LinearMap]:
    """Return the maps of the block whose weights are codes and whose inputs can be laid out as rows."""
    wanted = requested_weights(block.graph)
    nodes = [node for node in block.segment.nodes if node in wanted and node.name in decided.weights]
    found = ((node, read_linear_map(block.graph, node)) for node in nodes)
    return {node: linear for node, linear in found if linear is not None and not linear.is_transposed}


def _watch_inputs(
    sums: InputMoments | InputMeans, block: Block, decided: Quantization, node: fx.Node, linear: LinearMap
) -> None:
    """Add what the map reads, of all chunks that teach, quantized and in float."""
    both = (_rows_read(block, decided, node, linear, is_exact=is_exact) for is_exact in (False, True))
    for quantized, exact in zip(*both, strict=True):
        sums.update(quantized, exact)
        del quantized, exact
        give_back_memory()


def _rows_read(
    block: Block, decided: Quantization, node: fx.Node, linear: LinearMap, *, is_exact: bool
) -> Iterator[Tensor]:
    """Yield what a map reads of every chunk that teaches, as rows.

    Raises:
        BadInput: it is not finite.
    """
    compute = quickly if is_exact else Simulation(decided)
    for chunk in block.split.teaching:
        x = block.inputs_of(node, chunk, compute, is_exact=is_exact)
        if not bool(x.isfinite().all()):
            raise not_finite(node, ~x.isfinite(), block.numbers[chunk])
        yield _rows(node, linear, x)
        del x
        give_back_memory()


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
