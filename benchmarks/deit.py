"""DeiT-S shapes with random weights, and the same with norms that fold."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Final

import torch
from torch import Tensor, nn

from benchmarks.random_weights import randomized_norms
from normfuse.nn import PRepBN, UnifiedNorm, replace_norms

__all__ = ["NORMS", "deit_small", "images"]

NORMS: Final[dict[str, Callable[[int], nn.Module] | None]] = {
    "LN": None,
    "UN": UnifiedNorm,
    "PRepBN": partial(PRepBN, total_step=0),  # trained to the end
}


class Logits(nn.Module):
    """transformers' classifier with one tensor in and one tensor out."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> Tensor:
        """Return logits [batch, 1000] for images [batch, 3, 224, 224]."""
        logits: Tensor = self.model(pixel_values=image).logits
        return logits


def deit_small(norm: str, *, layers: int = 12, seed: int = 0) -> nn.Module:
    """Return a ViT of width 384, 6 heads and 197 tokens in eval mode; its norms are random."""
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(seed)
    shape = ViTConfig(
        hidden_size=384, num_hidden_layers=layers, num_attention_heads=6, intermediate_size=1536, num_labels=1000
    )
    model = Logits(ViTForImageClassification(shape))
    factory = NORMS[norm]
    if factory is not None:
        replace_norms(model, factory)
    return randomized_norms(model, seed=seed)


def images(count: int, *, seed: int = 0) -> Tensor:
    """Return random images, normal and not zero."""
    return torch.randn(count, 3, 224, 224, generator=torch.Generator().manual_seed(seed))
