"""Norms to train with that become a constant affine at inference, and fold, and what is published beside them."""

from normfuse.nn.batch_channel_norm import BatchChannelNorm, EstBN
from normfuse.nn.evo_norm import EvoNormB0
from normfuse.nn.instance_batch_norm import IBN
from normfuse.nn.linear_attention import SimplifiedLinearAttention
from normfuse.nn.power_norm import PowerNorm
from normfuse.nn.rep_norm import PRepBN, RepBN
from normfuse.nn.replace_norms import replace_norms
from normfuse.nn.rms_norm import CRMSNorm, RMSNorm, compress_channels, expand_channels
from normfuse.nn.unified_norm import UnifiedNorm
from normfuse.nn.weight_standardization import Deviation, StandardizedConv2d, standardize_convs, standardize_weight

__all__ = [
    "IBN",
    "BatchChannelNorm",
    "CRMSNorm",
    "Deviation",
    "EstBN",
    "EvoNormB0",
    "PRepBN",
    "PowerNorm",
    "RMSNorm",
    "RepBN",
    "SimplifiedLinearAttention",
    "StandardizedConv2d",
    "UnifiedNorm",
    "compress_channels",
    "expand_channels",
    "replace_norms",
    "standardize_convs",
    "standardize_weight",
]
