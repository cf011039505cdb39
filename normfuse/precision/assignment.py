"""Gives every linear map of a graph with requests the bits that were chosen for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import fx

from normfuse.graph import Graph, ops, query
from normfuse.graph.edit import Editor, editing
from normfuse.graph.quantization import (
    QuantizationRequest,
    WeightRequest,
    request_weight,
    requested_weights,
    requests,
    retype,
    withdraw,
    withdraw_weight,
)
from normfuse.quant.bits import FLOAT, Bits
from normfuse.quant.placement import Placement

__all__ = ["PlacementOf", "assigned", "may_narrow", "wanted_weight"]

PlacementOf = Callable[[Bits], Placement]
"""What the target wants for a width of weights and one of activations."""


def assigned(graph: Graph, bits: Mapping[str, Bits], placement_of: PlacementOf) -> Graph:
    """Return a copy in which the named linear maps, and what they read, have these bits; others keep theirs.

    What enters the model keeps the codes that it has unless its readers compute in float.

    Args:
        graph: a float graph with requests (``place-quantizers``) of eight bits.
        bits: by the name of the linear map; maps that read one request have one width of activations.
        placement_of: the target.
    """
    found = graph.copy()
    maps = requested_weights(found)
    with editing(found) as edit:
        for request in requests(found):
            chosen = [bits[node.name] for node in request.readers if node in maps and node.name in bits]
            if chosen:
                _narrow(edit, request, chosen, placement_of)
        for node in maps:
            if (given := bits.get(node.name)) is None:
                continue
            if given.is_float:
                withdraw_weight(node)
            else:
                asked = wanted_weight(node, placement_of(given))
                request_weight(node, asked.type, group=asked.group, is_symmetric=asked.is_symmetric)
    return found


def may_narrow(request: QuantizationRequest) -> bool:
    """Return whether the codes of a request may have fewer bits than the target's widest."""
    return request.source.op != "placeholder"


def _narrow(edit: Editor, request: QuantizationRequest, chosen: list[Bits], placement_of: PlacementOf) -> None:
    (width,) = {each.activation for each in chosen}
    if width == FLOAT:
        withdraw(edit, request)
    elif may_narrow(request) and (type_ := placement_of(chosen[0]).activation) is not None:
        retype(edit, request, type_)


def wanted_weight(node: fx.Node, wanted: Placement) -> WeightRequest:
    """Return what a target asks of the weight of a linear map."""
    group = None
    if node.target is ops.LINEAR:
        group = wanted.group_of(query.shape(node.args[1])[-1])  # type: ignore[arg-type]
    is_symmetric = wanted.weight_is_symmetric or (group is None and wanted.activation is None)
    return WeightRequest(wanted.weight, group, is_symmetric)
