"""Norms to train with that become a constant affine at inference, and fold, and what is published beside them.

``prepare_qat`` fine-tunes on the integers that ship; it is imported when it is first asked for, because it brings the
compiler with it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

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

if TYPE_CHECKING:
    from normfuse.nn.integer_training import IntegerTraining, prepare_qat

__all__ = [
    "IBN",
    "BatchChannelNorm",
    "CRMSNorm",
    "Deviation",
    "EstBN",
    "EvoNormB0",
    "IntegerTraining",
    "PRepBN",
    "PowerNorm",
    "RMSNorm",
    "RepBN",
    "SimplifiedLinearAttention",
    "StandardizedConv2d",
    "UnifiedNorm",
    "compress_channels",
    "expand_channels",
    "prepare_qat",
    "replace_norms",
    "standardize_convs",
    "standardize_weight",
]


def __getattr__(name: str) -> Any:
    """Import what needs the compiler when it is first asked for."""
    if name not in ("IntegerTraining", "prepare_qat"):
        raise AttributeError(f"module 'normfuse.nn' has no attribute {name!r}")
    return getattr(import_module("normfuse.nn.integer_training"), name)
