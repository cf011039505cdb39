"""The specification of every operator of the domain ``normfuse``, in plain torch on any device.

Rounding, saturation and widths are defined here or in ``normfuse.quant.rounding`` and nowhere else; every engine's
version is tested against this one, bit for bit where integers are concerned. `quantize` and `dequantize` are the
functions of ``normfuse.quant`` on bare tensors, because calibration computes with the same ones.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from normfuse.quant.logarithm import dequantize_logarithm, quantize_logarithm
from normfuse.quant.rounding import dequantize_tensor as dequantize
from normfuse.quant.rounding import quantize_tensor as quantize

__all__ = ["dequantize", "dequantize_logarithm", "quantize", "quantize_logarithm", "reshape", "unpack"]


def unpack(codes: Tensor, scale: Tensor) -> Tensor:
    """Return the float weight that symmetric codes stand for: ``codes * scale`` along axis 0, in the scale's type."""
    return dequantize(codes, scale, torch.zeros_like(scale, dtype=torch.int32), 0)


def reshape(x: Tensor, shape: Sequence[int]) -> Tensor:
    """Return a copy of ``x`` in another shape; one size may be -1."""
    return x.reshape(list(shape)).clone()
