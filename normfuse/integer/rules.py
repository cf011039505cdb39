"""Which function writes which operator."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from normfuse.graph import Graph, ops
from normfuse.graph.affine import AFFINE
from normfuse.graph.quantization import is_requested, requests
from normfuse.integer.attention import attention, whole_attention
from normfuse.integer.elementwise import add, mean, multiply, table
from normfuse.integer.lowering import Rule, unsupported
from normfuse.integer.moves import concatenate, interpolate, pad, repeat_nearest
from normfuse.integer.norms import norm
from normfuse.integer.products import product
from normfuse.integer.roles import CLAMPS, MEANS, POINTWISE, is_view

__all__ = ["RULES", "refuse_unsupported"]

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
}


def refuse_unsupported(graph: Graph) -> None:
    """Refuse a graph with requests behind operators that nothing here writes, before anything is calibrated.

    Raises:
        UnsupportedModel: there is one; the message names the layer.
    """
    for request in requests(graph):
        source = request.source
        is_made = source.op == "call_function" and not is_requested(source) and not is_view(source)
        if is_made and source.target not in {*RULES, *CLAMPS, AFFINE}:
            raise unsupported(source)
