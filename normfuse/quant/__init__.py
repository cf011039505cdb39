"""Quantization as values and pure functions: types, parameters, rounding, histograms, ranges, exact sums, weights."""

from normfuse.quant.bias_correction import corrected_bias
from normfuse.quant.channel_scales import ChannelScales, SeenChannels, channel_scales
from normfuse.quant.coordinate_descent import descended
from normfuse.quant.drift_shrinkage import shrink_drift
from normfuse.quant.dynamic_rows import DynamicParams, round_rows
from normfuse.quant.exact_sum import ExactSum
from normfuse.quant.gptq import gptq_codes
from normfuse.quant.granularity import Granularity, PerChannel, PerGroup, PerTensor, dividing_group
from normfuse.quant.hessian import InputMoments
from normfuse.quant.histogram import DyadicHistogram
from normfuse.quant.input_means import InputMeans
from normfuse.quant.integer_type import INT4, INT8, INT8_NARROW, INT16, INT32, UINT4, UINT8, IntegerType
from normfuse.quant.logarithm import LogarithmicParams, logarithmic_params
from normfuse.quant.output_sums import OutputSums
from normfuse.quant.parameters import SMALLEST_SCALE, QuantParams, asymmetric, symmetric
from normfuse.quant.range_selection import Range, RangeMethod, candidates
from normfuse.quant.rounding import dequantize, quantize, quantize_dequantize
from normfuse.quant.rounding_problem import RoundingProblem
from normfuse.quant.snapping import ActivationParams, snap
from normfuse.quant.unfold import unfold_rows
from normfuse.quant.weights import RoundedWeight, WeightClip, round_to_nearest, scale_for_bias, weight_params

__all__ = [
    "INT4",
    "INT8",
    "INT8_NARROW",
    "INT16",
    "INT32",
    "SMALLEST_SCALE",
    "UINT4",
    "UINT8",
    "ActivationParams",
    "ChannelScales",
    "DyadicHistogram",
    "DynamicParams",
    "ExactSum",
    "Granularity",
    "InputMeans",
    "InputMoments",
    "IntegerType",
    "LogarithmicParams",
    "OutputSums",
    "PerChannel",
    "PerGroup",
    "PerTensor",
    "QuantParams",
    "Range",
    "RangeMethod",
    "RoundedWeight",
    "RoundingProblem",
    "SeenChannels",
    "WeightClip",
    "asymmetric",
    "candidates",
    "channel_scales",
    "corrected_bias",
    "dequantize",
    "descended",
    "dividing_group",
    "gptq_codes",
    "logarithmic_params",
    "quantize",
    "quantize_dequantize",
    "round_rows",
    "round_to_nearest",
    "scale_for_bias",
    "shrink_drift",
    "snap",
    "symmetric",
    "unfold_rows",
    "weight_params",
]
