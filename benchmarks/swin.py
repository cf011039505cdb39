"""Swin-T shapes with random weights, and the same with norms that fold."""

from __future__ import annotations

import torch
from torch import nn

from benchmarks.deit import NORMS, Logits
from benchmarks.random_weights import randomized_norms
from normfuse.nn import replace_norms

__all__ = ["swin_tiny"]


def swin_tiny(norm: str, *, seed: int = 0) -> nn.Module:
    """Return Swin-T (96, depths 2, 2, 6, 2, windows of 7, 224 pixels) in eval mode; frozen statistics are random."""
    from transformers import SwinConfig, SwinForImageClassification

    torch.manual_seed(seed)
    model = Logits(SwinForImageClassification(SwinConfig(num_labels=1000)))
    factory = NORMS[norm]
    if factory is not None:
        replace_norms(model, factory)
    return randomized_norms(model, seed=seed)
