"""The specification of every operator of the domain ``normfuse``, in plain torch on any device.

Rounding, saturation and widths are defined here or in ``normfuse.quant.rounding`` and nowhere else; every engine's
version is tested against this one, bit for bit where integers are concerned. `quantize` and `dequantize` are the
functions of ``normfuse.quant.rounding`` on bare tensors, because calibration computes with the same ones.
"""

from __future__ import annotations

from normfuse.quant.rounding import dequantize_tensor as dequantize
from normfuse.quant.rounding import quantize_tensor as quantize

__all__ = ["dequantize", "quantize"]
