"""The specification of every operator of the domain ``normfuse``, in plain torch on any device.

Rounding, saturation and widths are defined here or in ``normfuse.quant.rounding`` and nowhere else; every engine's
version is tested against this one, bit for bit where integers are concerned.
"""

from normfuse.kernels.reference.attention import int_attention
from normfuse.kernels.reference.interpolation import int_interpolate
from normfuse.kernels.reference.norms import int_layer_norm, int_rms_norm, square_root
from normfuse.kernels.reference.products import (
    int_conv2d,
    int_conv2d_add,
    int_linear,
    int_linear_add,
    int_linear_table,
    int_matmul,
)
from normfuse.kernels.reference.quantizers import (
    dequantize,
    dequantize_logarithm,
    grouped_linear,
    grouped_lookup,
    quantize,
    quantize_float8,
    quantize_logarithm,
    reshape,
    unpack,
)
from normfuse.kernels.reference.rescaling import int_add, int_mean, int_multiply, rescale
from normfuse.kernels.reference.shift_exponential import lambda_shift_gelu, shift_gelu, shiftmax
from normfuse.kernels.reference.tables import int_table
from normfuse.kernels.reference.tokens import (
    int_linear_tokens,
    int_linear_tokens_table,
    int_token_codes,
    int_token_factors,
)

__all__ = [
    "dequantize",
    "dequantize_logarithm",
    "grouped_linear",
    "grouped_lookup",
    "int_add",
    "int_attention",
    "int_conv2d",
    "int_conv2d_add",
    "int_interpolate",
    "int_layer_norm",
    "int_linear",
    "int_linear_add",
    "int_linear_table",
    "int_linear_tokens",
    "int_linear_tokens_table",
    "int_matmul",
    "int_mean",
    "int_multiply",
    "int_rms_norm",
    "int_table",
    "int_token_codes",
    "int_token_factors",
    "lambda_shift_gelu",
    "quantize",
    "quantize_float8",
    "quantize_logarithm",
    "rescale",
    "reshape",
    "shift_gelu",
    "shiftmax",
    "square_root",
    "unpack",
]
