"""What is to be quantized: ``normfuse::request`` stands in front of those who read codes; maps carry a note."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, fx

from normfuse.graph import metadata, query
from normfuse.graph.edit import Editor
from normfuse.graph.graph import Graph
from normfuse.quant import (
    DyadicHistogram,
    QuantParams,
    Range,
    RangeMethod,
    RoundedWeight,
    candidates,
    round_to_nearest,
)
from normfuse.quant.float_type import CodeType, code_type

__all__ = [
    "QuantizationRequest",
    "WeightRequest",
    "is_requested",
    "request_quantization",
    "request_weight",
    "requested_weights",
    "requests",
    "retype",
    "withdraw",
    "withdraw_weight",
]


@torch.library.custom_op("normfuse::request", mutates_args=())
def request(x: Tensor, type: str, symmetric: bool, group: int = 0) -> Tensor:
    """Return ``x`` (ours); the other arguments are those of the ``QuantizationRequest``, 0 for no group."""
    return x.clone()  # an operator must not return its input itself


@request.register_fake
def _(x: Tensor, type: str, symmetric: bool, group: int = 0) -> Tensor:
    return torch.empty_like(x)


WEIGHT: Final = "weight_type"
REQUEST: Final = torch.ops.normfuse.request.default


@dataclass(frozen=True, slots=True)
class QuantizationRequest:
    """The value of ``source`` shall be quantized to ``type`` for the nodes that read ``node``, the request itself.

    With ``is_symmetric`` its zero point is 0. Where ``group`` neighbours on the last axis share a scale, it is found
    for every row while the engine runs; None: it comes from a range.
    """

    node: fx.Node
    source: fx.Node
    type: CodeType
    is_symmetric: bool = False
    group: int | None = None

    @property
    def readers(self) -> list[fx.Node]:
        """The nodes that shall read codes, in graph order."""
        return query.readers(self.node)

    def candidates(
        self, seen: DyadicHistogram, methods: Iterable[RangeMethod] = tuple(RangeMethod)
    ) -> dict[str, Range]:
        """Return the ranges worth trying for the values that were seen."""
        return candidates(seen, self.type, is_symmetric=self.is_symmetric, methods=methods)

    def quantizer(self, range_: Range) -> QuantParams:
        """Return the parameters that cover a range."""
        return range_.quantizer(self.type, is_symmetric=self.is_symmetric)


def request_quantization(
    edit: Editor,
    source: fx.Node,
    type_: CodeType,
    readers: Collection[fx.Node],
    *,
    is_symmetric: bool = False,
    group: int | None = None,
) -> None:
    """Let these readers of ``source`` read a request for it instead."""
    wanted = (str(type_), is_symmetric, *([] if group is None else [group]))
    node = edit.call(REQUEST, source, *wanted, at=source, after=True, name=f"{source.name}_request")
    edit.redirect(source, node, only=lambda reader: reader in readers)


def retype(edit: Editor, request: QuantizationRequest, type_: CodeType) -> None:
    """Ask for codes of another type."""
    edit.set_argument(request.node, 1, str(type_))


def withdraw(edit: Editor, request: QuantizationRequest) -> None:
    """Take a request back: its readers read floats, and linear maps among them keep float weights too."""
    for reader in request.readers:
        withdraw_weight(reader)
    edit.redirect(request.node, request.source)


@dataclass(frozen=True, slots=True)
class WeightRequest:
    """The constant weight of a linear map shall be codes of ``type``; ``group`` inputs share a scale, None: all.

    Unless it ``is_symmetric`` they share a zero point, too.
    """

    type: CodeType
    group: int | None = None
    is_symmetric: bool = True

    def nearest(self, weight: Tensor, bias: Tensor | None, *, input_scale: float | None) -> RoundedWeight:
        """Return the weight with every number at its nearest code, see ``round_to_nearest``."""
        return round_to_nearest(
            weight, bias, self.type, input_scale=input_scale, group=self.group, is_symmetric=self.is_symmetric
        )


def request_weight(node: fx.Node, type_: CodeType, *, group: int | None = None, is_symmetric: bool = True) -> None:
    """Ask that the constant weight of a linear map is held as codes."""
    metadata.note(node, WEIGHT, WeightRequest(type_, group, is_symmetric))


def withdraw_weight(node: fx.Node) -> None:
    """Take the wish back, because it was fulfilled or cannot be."""
    metadata.note(node, WEIGHT, None)


def requested_weights(graph: Graph) -> dict[fx.Node, WeightRequest]:
    """Return the linear maps whose weights shall be codes, in graph order."""
    noted = {node: metadata.noted(node, WEIGHT) for node in graph.nodes}
    return {node: request for node, request in noted.items() if isinstance(request, WeightRequest)}


def is_requested(node: object) -> bool:
    """Return whether ``node`` is a request."""
    return query.is_call(node, REQUEST)


def requests(graph: Graph) -> list[QuantizationRequest]:
    """Return the requests of the graph, in its order."""
    return [_read(node) for node in graph.nodes if is_requested(node)]


def _read(node: fx.Node) -> QuantizationRequest:
    source, type_, symmetric, *group = node.args
    assert isinstance(source, fx.Node)
    return QuantizationRequest(node, source, code_type(str(type_)), bool(symmetric), *(int(size) for size in group))  # type: ignore[arg-type]
