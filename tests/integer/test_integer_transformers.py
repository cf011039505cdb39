"""Models of transformers, tiny and with random weights: every code near enough, or refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from integer_module import hold_all, lower
from torch import Tensor, nn

from normfuse.errors import UnsupportedModel
from normfuse.testing import seeded

transformers: Any = pytest.importorskip("transformers")

TOKENS = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
PATCHES = {**TOKENS, "image_size": 16, "patch_size": 8}
STAGES = {"hidden_sizes": [8, 8, 12, 16], "depths": [1, 1, 1, 1]}
IMAGE, SOUND = (3, 32, 32), (400,)


class Logits(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)[0]  # type: ignore[no-any-return]


class Words(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, words: Tensor, mask: Tensor) -> Tensor:
        return self.network(input_ids=words, attention_mask=mask)[0]  # type: ignore[no-any-return]


def made(name: str, **options: Any) -> Callable[[], nn.Module]:
    """Return what makes a model of that name, for images, sounds or words."""
    is_encoder = name.endswith("Model")
    config = name.removesuffix("Model") if is_encoder else name.rpartition("For")[0]

    def make() -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            network = getattr(transformers, name)(getattr(transformers, f"{config}Config")(**options)).eval()
        return (Words if is_encoder else Logits)(network)

    return make


Shapes = tuple[Any, ...]


def words(count: int) -> Shapes:
    lengths = torch.randint(3, 9, (count, 1), generator=seeded(2))
    return torch.randint(2, 50, (count, 8), generator=seeded(1)), (torch.arange(8) < lengths).long()


COMPUTED: dict[str, tuple[Callable[[], nn.Module], Shapes]] = {
    "ViT": (made("ViTForImageClassification", **PATCHES), ((3, 16, 16),)),
    "BEiT": (made("BeitForImageClassification", **PATCHES, use_relative_position_bias=True), ((3, 16, 16),)),
    "PoolFormer": (made("PoolFormerForImageClassification", **STAGES), (IMAGE,)),
    "ALBERT": (made("AlbertModel", **TOKENS, vocab_size=50, embedding_size=16), words(16)),
    "wav2vec 2.0": (
        made(
            "Wav2Vec2ForSequenceClassification",
            **TOKENS,
            **{"conv_dim": (8, 8), "conv_stride": (5, 4), "conv_kernel": (10, 4), "num_conv_pos_embeddings": 4},
            **{"num_conv_pos_embedding_groups": 2, "feat_extract_norm": "layer", "do_stable_layer_norm": True},
            classifier_proj_size=8,
        ),
        (SOUND,),
    ),
}

REFUSED: dict[str, tuple[Callable[[], nn.Module], Shapes, str]] = {
    "Swin V2, whose masks are added behind a reshape": (
        made(
            "Swinv2ForImageClassification",
            **{"image_size": 16, "patch_size": 2, "embed_dim": 8, "depths": [2], "num_heads": [2], "window_size": 4},
        ),
        ((3, 16, 16),),
        "attention",
    ),
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("make", "shapes"), COMPUTED.values(), ids=COMPUTED)
def test_a_model_that_is_integers(make: Callable[[], nn.Module], shapes: Shapes) -> None:
    hold_all(make(), *shapes, is_written=False)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("make", "shapes", "where"), REFUSED.values(), ids=REFUSED)
def test_a_model_that_is_refused(make: Callable[[], nn.Module], shapes: Shapes, where: str) -> None:
    with pytest.raises(UnsupportedModel) as refusal:
        lower(make(), *shapes, is_written=False)
    assert where in refusal.value.where
