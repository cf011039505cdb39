"""Which function writes which operator."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import fx

from normfuse.errors import UnsupportedModel
from normfuse.graph import Graph, ops, query
from normfuse.graph.affine import AFFINE
from normfuse.graph.quantization import is_requested, requests
from normfuse.integer.attention import attention, whole_attention
from normfuse.integer.elementwise import add, mean, multiply, table
from normfuse.integer.gelu import gelu
from normfuse.integer.lowering import Rule, unsupported
from normfuse.integer.moves import concatenate, interpolate, pad, repeat_nearest
from normfuse.integer.norms import norm
from normfuse.integer.products import product
from normfuse.integer.roles import CLAMPS, MEANS, POINTWISE, is_view

__all__ = ["RULES", "has_integer_form", "refuse_other_floats", "refuse_unsupported", "refuse_whole_attention"]

RULES: Final[Mapping[Any, Rule]] = {
    ops.LINEAR: product,
    ops.CONV2D: product,
    ops.MATMUL: attention,
    ops.ATTENTION: whole_attention,
    ops.ADD: add,
    ops.SUB: add,
    ops.MUL: multiply,
    ops.LAYER_NORM: norm,
    ops.RMS_NORM: norm,
    ops.CAT: concatenate,
    ops.PAD: pad,
    ops.ATEN.upsample_nearest2d.vec: repeat_nearest,
    ops.ATEN.upsample_bilinear2d.vec: interpolate,
    **dict.fromkeys(MEANS, mean),
    **dict.fromkeys(POINTWISE, table),
    ops.GELU: gelu,
}


def refuse_unsupported(graph: Graph) -> None:
    """Refuse a graph with requests behind operators that nothing here writes, before anything is calibrated.

    Raises:
        UnsupportedModel: there are some; the message names them and their layers.
    """
    left = dict[str, UnsupportedModel]()
    for request in requests(graph):
        if not has_integer_form(request.source):
            refusal = unsupported(request.source)
            left.setdefault(refusal.what, refusal)
    if not left:
        return
    first, *others = left.values()
    also = [f"{each.what.partition(' ')[0]} at {each.where}" for each in others]
    what = f"{first.what}, and neither has {', '.join(also)}" if also else first.what
    raise UnsupportedModel(what, where=first.where, expected=first.expected, hint=first.hint)


def refuse_whole_attention(graph: Graph) -> None:
    """Refuse a graph with attention that could not be spelled out, where softmax has to be seen.

    Raises:
        UnsupportedModel: there is one; the message names the layer.
    """
    for node in graph.nodes:
        if query.is_call(node, ops.ATTENTION):
            raise UnsupportedModel(
                "attention with this mask cannot be spelled out for shiftmax",
                where=query.layer_of(node) or node.name,
                expected="no mask, a constant one, or a boolean one",
                hint="--softmax table",
            )


def refuse_other_floats(graph: Graph, wanted: str = "integers") -> None:
    """Refuse a graph with floats of another type than float32, which cannot be written as what is wanted.

    Raises:
        UnsupportedModel: there is one; the message names the input or the layer.
    """
    for node in graph.nodes:
        if not query.is_constant(node) and query.is_float(node) and query.dtype(node) is not torch.float32:
            raise UnsupportedModel(
                f"the model computes in {query.dtype(node)}",
                where=query.layer_of(node) or node.name,
                expected=f"torch.float32, of which {wanted} are made",
                hint="capture model.float() with inputs of torch.float32",
            )


def has_integer_form(node: fx.Node) -> bool:
    """Return whether something here writes what makes a value, whatever its options and sizes."""
    is_made = node.op == "call_function" and not is_requested(node) and not is_view(node)
    return not is_made or node.target in {*RULES, *CLAMPS, AFFINE}
