"""What was decided for a graph with requests: parameters of activations, codes of weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from torch import fx

from normfuse.graph import Graph, query
from normfuse.graph.quantization import QuantizationRequest, requested_weights, requests
from normfuse.heap import give_back_memory
from normfuse.quant import ActivationParams, DynamicParams, QuantParams, Range, RoundedWeight
from normfuse.rewrite.linear_map import read_linear_map

__all__ = [
    "Quantization",
    "activation_params",
    "decide_again",
    "input_scales",
    "round_all_to_nearest",
    "scale_for_maps",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantization:
    """Parameters by the name of the node that makes the tensor, and weights by the name of the linear map."""

    activations: Mapping[str, ActivationParams]
    weights: Mapping[str, RoundedWeight]

    def changed(
        self,
        *,
        activations: Mapping[str, ActivationParams] = MappingProxyType({}),
        weights: Mapping[str, RoundedWeight] = MappingProxyType({}),
    ) -> Quantization:
        """Return the decision with these in the place of what it had by their names."""
        return Quantization(activations={**self.activations, **activations}, weights={**self.weights, **weights})

    @property
    def kinds(self) -> dict[str, int]:
        """How many activations have static and dynamic scales, how many weights have no zero points and some."""
        dynamic = sum(isinstance(params, DynamicParams) for params in self.activations.values())
        shifted = sum(bool(weight.params.zero_point.any()) for weight in self.weights.values())
        return {
            "static activations": len(self.activations) - dynamic,
            "dynamic activations": dynamic,
            "symmetric weights": len(self.weights) - shifted,
            "asymmetric weights": shifted,
        }


def activation_params(graph: Graph, ranges: Mapping[str, Range]) -> dict[str, ActivationParams]:
    """Return the parameters that the requests of a graph get, static ones from ranges; what has none stays float."""
    found = dict[str, ActivationParams]()
    for request in requests(graph):
        if request.group is not None:
            found[request.source.name] = DynamicParams(size=request.group)
        elif (range_ := ranges.get(request.source.name)) is not None:
            found[request.source.name] = request.quantizer(range_)
    return found


def input_scales(graph: Graph, activations: Mapping[str, ActivationParams]) -> dict[fx.Node, float | None]:
    """Return the maps whose weights are to be codes, with the scale of their input's codes; None: they add floats.

    A map whose input was to be quantized and could not be is left out: it computes floats.
    """
    reads = {
        reader: request.source.name
        for request in requests(graph)
        for reader in (_behind_views(graph, request) if _is_by_token(activations, request) else request.readers)
    }
    maps = [node for node in requested_weights(graph) if node not in reads or reads[node] in activations]
    return {node: scale_for_maps(activations[reads[node]]) if node in reads else None for node in maps}


def _is_by_token(activations: Mapping[str, ActivationParams], request: QuantizationRequest) -> bool:
    """Return whether tokens find their scales and sums are integers: then views of them are read, too."""
    params = activations.get(request.source.name)
    return isinstance(params, DynamicParams) and params.sum_scale is not None


def _behind_views(graph: Graph, request: QuantizationRequest) -> Iterator[fx.Node]:
    """Yield the maps that read tokens; whatever else reads them moves them (``place-integers``)."""
    maps, found = requested_weights(graph), [*request.readers]
    while found:
        reader = found.pop()
        if reader in maps:
            yield reader
        elif query.is_tensor(reader):  # a size is read by others
            found += query.readers(reader)


def scale_for_maps(params: ActivationParams) -> float | None:
    """Return what a linear map's sums count in, over its weight's scale; None: its bias is added in float.

    That is the one scale of the codes that it reads (other codes are for products of activations).
    """
    if isinstance(params, DynamicParams):
        return params.sum_scale
    assert isinstance(params, QuantParams)
    return float(params.scale)


def round_all_to_nearest(graph: Graph, ranges: Mapping[str, Range]) -> Quantization:
    """Return the plainest decision: every activation by its range, every weight to its nearest code."""
    return decide_again(graph, ranges, Quantization(activations={}, weights={}))


def decide_again(graph: Graph, ranges: Mapping[str, Range], known: Quantization) -> Quantization:
    """Return a decision for a graph whose requests have changed: what still fits them is kept, the rest is nearest."""
    activations = activation_params(graph, ranges)
    for name, params in activations.items():
        if (before := known.activations.get(name)) is not None and before.type == params.type:
            activations[name] = before
    weights, wanted = {}, requested_weights(graph)
    for node, scale in input_scales(graph, activations).items():
        if (linear := read_linear_map(graph, node)) is None:
            continue
        kept, asked = known.weights.get(node.name), wanted[node]
        if kept is not None and kept.params.type == asked.type and kept.holds_bias(scale):
            weights[node.name] = kept
        else:
            weights[node.name] = asked.nearest(linear.weight, linear.bias, input_scale=scale)
        give_back_memory()
    return Quantization(activations=activations, weights=weights)
