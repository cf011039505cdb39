"""Norms whose codes have a scale per token: what is left of the norm is a factor behind the maps that read them."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from typing import Final

from torch import Tensor, fx

from normfuse.graph import ops, query
from normfuse.graph.edit import Editor
from normfuse.graph.quantization import request_quantization
from normfuse.graph.text import operator_name
from normfuse.integer.roles import viewed
from normfuse.integer.token_views import moved_factors
from normfuse.kernels.reference.norms import FRACTION
from normfuse.kernels.reference.tokens import LARGEST
from normfuse.quant import DynamicParams
from normfuse.quant.integer_type import INT8_NARROW

__all__ = [
    "TOKEN_SCALE",
    "request_tokens",
    "scaled_sums",
    "token_params",
    "token_shift",
    "why_not_by_token",
]

TOKEN_SCALE: Final = 2.0**-FRACTION / LARGEST
"""What a code times its factor counts in."""

SCALED_BITS: Final = 29
"""Of a sum times its factor, once it is shifted: with a bias of 30 bits and a multiplier of 31 it is below 2^62."""


def request_tokens(edit: Editor, norm: fx.Node) -> None:
    """Ask for codes of a norm that have one scale per token."""
    channels = query.shape(norm)[-1]
    assert isinstance(channels, int)
    request_quantization(edit, norm, INT8_NARROW, query.readers(norm), is_symmetric=True, group=channels)


def why_not_by_token(norm: fx.Node, part_of_larger: Collection[fx.Node]) -> str:
    """Return why a norm's codes cannot have scales per token; nothing if they can.

    Args:
        norm: a layer or RMS norm.
        part_of_larger: the nodes that are computed in one with what reads them.
    """
    shape = norm.args[1]
    if not isinstance(shape, (list, tuple)) or len(shape) != 1 or not isinstance(query.shape(norm)[-1], int):
        return f"it is over {shape}, not over one axis of fixed size"
    gamma_and_beta = zip(ops.ONLINE_NORMS[norm.target], ("weight", "bias"), strict=False)
    if any(query.argument(norm, index, name) is not None for index, name in gamma_and_beta):
        return "gamma and beta are not part of the linear maps behind it"
    for reader, read in _readers(norm):
        if not query.is_call(reader, ops.LINEAR) or viewed(reader) is not read or not query.is_constant(reader.args[1]):
            return f"{_called(reader)} reads it, which is no linear map with constant weights"
        if reader in part_of_larger and any(query.is_call(each, ops.ADD) for each in query.readers(reader)):
            return f"{_called(reader)} reads it, which is computed in one with a sum"
    return ""


def _readers(node: fx.Node) -> Iterator[tuple[fx.Node, fx.Node]]:
    """Yield who reads tokens, and the view of them that it reads; sizes are no values."""
    for reader in query.readers(node):
        if moved_factors(reader) is not None and viewed(reader) is node:
            yield from _readers(reader)
        elif not query.is_call(reader, ops.ATEN.sym_size.int):
            yield reader, node


def _called(node: fx.Node) -> str:
    return f"{operator_name(node.target)} at {query.layer_of(node) or node.name}"


def token_params(channels: int) -> DynamicParams:
    """Return what the codes of tokens with so many channels are."""
    return DynamicParams(size=channels, sum_scale=TOKEN_SCALE * 2.0 ** token_shift(channels))


def token_shift(channels: int) -> int:
    """Return how far sums times factors are shifted: no further than any weights of 8 bits need."""
    return max(math.frexp(channels * LARGEST**2 * _largest_factor(channels))[1] - SCALED_BITS, 1)


def scaled_sums(sums: Tensor, channels: int) -> Tensor:
    """Return the largest magnitudes of sums that are multiplied with their factors and shifted.

    Args:
        sums: float64 [out], the largest magnitudes of the sums.
        channels: of a token.
    """
    return sums * _largest_factor(channels) * 2.0 ** -token_shift(channels) + 1


def _largest_factor(channels: int) -> float:
    """Return what no factor is above: max |d| / r is at most the root of the number of channels."""
    return (math.sqrt(channels) + 1) * 2.0**FRACTION
