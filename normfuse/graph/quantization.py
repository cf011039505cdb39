"""Which tensors of a graph are to be quantized, for whom, and how: requests as typed notes on nodes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import fx

from normfuse.graph import metadata
from normfuse.graph.graph import Graph
from normfuse.quant import IntegerType

__all__ = ["QuantizationRequest", "request_quantization", "requested", "requests"]

KEY = "quantization_request"


@dataclass(frozen=True, slots=True)
class QuantizationRequest:
    """The node's value shall be quantized to ``type``; ``readers`` (node names) read the codes."""

    type: IntegerType
    readers: frozenset[str]


def request_quantization(node: fx.Node, type_: IntegerType, readers: frozenset[str]) -> None:
    """Ask that the node's value be quantized for these readers, besides those that asked before."""
    before = requested(node)
    metadata.note(node, KEY, QuantizationRequest(type_, readers | (before.readers if before else frozenset())))


def requested(node: fx.Node) -> QuantizationRequest | None:
    """Return what was asked for the node, or None."""
    found = metadata.noted(node, KEY)
    return found if isinstance(found, QuantizationRequest) else None


def requests(graph: Graph) -> Iterator[tuple[fx.Node, QuantizationRequest]]:
    """Yield every node whose value is to be quantized, in graph order."""
    for node in graph.nodes:
        if (found := requested(node)) is not None:
            yield node, found
