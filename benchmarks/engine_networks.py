"""Networks of real shapes with random weights, whole or some layers deep: what engines are built of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
import transformers
from torch import Tensor, nn

from benchmarks.random_weights import randomized_norms

__all__ = ["NETWORKS", "WHOLE", "network"]

CLASSES: Final = 1000
TOKENS: Final = 128
WORDS: Final = 2000


class Logits(nn.Module):
    """transformers' classifier with one tensor in and one tensor out."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        """Return logits for images, or indices of words."""
        logits: Tensor = self.model(x).logits
        return logits


def _encoder(prefix: str, **sizes: Any) -> nn.Module:
    config = getattr(transformers, f"{prefix}Config")
    kind = "SequenceClassification" if prefix == "Bert" else "ImageClassification"
    model: nn.Module = getattr(transformers, f"{prefix}For{kind}")(config(**{"num_labels": CLASSES, **sizes}))
    return model


def _attending(prefix: str, width: int, **sizes: Any) -> nn.Module:
    usual = {"hidden_size": width, "intermediate_size": 4 * width, "num_attention_heads": width // 64}
    return _encoder(prefix, **{**usual, "num_hidden_layers": 2, **sizes})


NETWORKS: Final[dict[str, Callable[[], nn.Module]]] = {
    "vit": lambda: _attending("ViT", 384),
    "deit": lambda: _attending("DeiT", 192),
    "swin": lambda: _encoder("Swin", embed_dim=96, depths=[1, 2], num_heads=[3, 6]),
    "bert": lambda: _attending("Bert", 384, vocab_size=WORDS),
    "resnet": lambda: _encoder("ResNet", embedding_size=64, hidden_sizes=[64, 128], depths=[1, 2], layer_type="basic"),
    "mobilenet": lambda: _encoder("MobileNetV2", depth_multiplier=1.0, image_size=224),
}


WHOLE: Final[dict[str, Callable[[], nn.Module]]] = {
    "vit-s": lambda: _attending("ViT", 384, num_hidden_layers=12),
    "deit-s": lambda: _attending("DeiT", 384, num_hidden_layers=12),
    "swin-t": lambda: _encoder("Swin"),
    "bert-base": lambda: _attending("Bert", 768, num_hidden_layers=12),
    "resnet-50": lambda: _encoder("ResNet"),
    "mobilenet-v2": NETWORKS["mobilenet"],
}
"""As deep as they are published."""


def network(name: str, *, seed: int = 0) -> tuple[nn.Module, Tensor]:
    """Return a network in eval mode, its norms random, and two samples of its input."""
    torch.manual_seed(seed)
    model = randomized_norms(Logits({**NETWORKS, **WHOLE}[name]()), seed=seed)
    samples = torch.randint(0, WORDS, (2, TOKENS)) if name.startswith("bert") else torch.randn(2, 3, 224, 224)
    return model, samples
