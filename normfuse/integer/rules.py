"""Which function writes which operator."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from normfuse.graph import ops
from normfuse.integer.attention import attention, whole_attention
from normfuse.integer.elementwise import add, mean, multiply, table
from normfuse.integer.lowering import Rule
from normfuse.integer.moves import concatenate, interpolate, repeat_nearest
from normfuse.integer.norms import norm
from normfuse.integer.products import product
from normfuse.integer.roles import MEANS, POINTWISE

__all__ = ["RULES"]

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
    ops.ATEN.upsample_nearest2d.vec: repeat_nearest,
    ops.ATEN.upsample_bilinear2d.vec: interpolate,
    **dict.fromkeys(MEANS, mean),
    **dict.fromkeys(POINTWISE, table),
}
