"""The codes that an activation can get, and the value that a tensor moves to under each."""

from __future__ import annotations

from torch import Tensor

from normfuse.quant.dynamic_rows import DynamicParams, round_rows
from normfuse.quant.logarithm import LogarithmicParams, nearest_levels
from normfuse.quant.parameters import QuantParams
from normfuse.quant.rounding import quantize_dequantize

__all__ = ["ActivationParams", "snap"]

ActivationParams = QuantParams | LogarithmicParams | DynamicParams


def snap(x: Tensor, params: ActivationParams) -> Tensor:
    """Return ``x`` moved to the nearest value that has a code, in x's shape and type."""
    if isinstance(params, QuantParams):
        return quantize_dequantize(x, params)
    if isinstance(params, DynamicParams):
        return round_rows(x, params)
    scale = params.granularity.spread(params.scale.to(x.device, x.dtype), x.shape)
    levels = params.levels.to(x.device, x.dtype)
    return levels[nearest_levels(x / scale, levels)] * scale
