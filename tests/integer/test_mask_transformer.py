"""A mask transformer: patches and classes of length one, multiplied, normed over classes, drawn at full size."""

from __future__ import annotations

from typing import Final

import pytest
import torch
from integer_module import hold, lower, normal
from torch import Tensor, nn
from torch.nn import functional as F

from normfuse.testing import seeded

WIDTH, INNER, CLASSES, SIDE, SCALE = 12, 20, 5, 6, 4

CLEAR: Final = 0.1
"""How much the best class leads where there is one: a tenth of the scores' own deviation, which is one."""

SAME_CLASS: Final = 0.95
SAME_CLEAR_CLASS: Final = 0.99
"""Pixels whose class is the float one's: of all, and of those with a clear one."""


class MaskTransformer(nn.Module):
    """Segmenter's decoder: class tokens join the patches for a block, then every patch is compared with every class."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(WIDTH, INNER)
        self.classes = nn.Parameter(torch.zeros(1, CLASSES, INNER))
        self.block = nn.TransformerEncoderLayer(
            INNER, 2, 2 * INNER, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.norm = nn.LayerNorm(INNER)
        self.of_patches, self.of_classes = (nn.Parameter(torch.zeros(INNER, INNER)) for _ in range(2))
        self.mask_norm = nn.LayerNorm(CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.project(x)
        x = self.norm(self.block(torch.cat((x, self.classes.expand(x.size(0), -1, -1)), 1)))
        patches, classes = x[:, :-CLASSES] @ self.of_patches, x[:, -CLASSES:] @ self.of_classes
        patches = patches / patches.norm(dim=-1, keepdim=True)
        classes = classes / classes.norm(dim=-1, keepdim=True)
        masks = self.mask_norm(patches @ classes.transpose(1, 2))
        image = masks.transpose(1, 2).reshape(-1, CLASSES, SIDE, SIDE)
        return F.interpolate(image, scale_factor=SCALE, mode="bilinear")


def decoder() -> nn.Module:
    network, generator = MaskTransformer().eval(), seeded(3)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5)
    return network


@pytest.mark.slow
def test_a_mask_transformer_is_integers_and_draws_the_same_map() -> None:
    network = decoder()
    lowered = lower(network, (SIDE * SIDE, WIDTH), count=32)
    hold(lowered, (SIDE * SIDE, WIDTH))
    assert lowered.operators.count("int_rms_norm") == 2, "patches and classes"
    assert lowered.operators.count("int_matmul") == 1
    assert lowered.operators[-2:] == ["int_interpolate", "int_interpolate"]
    x = normal(32, SIDE * SIDE, WIDTH, seed=7)
    with torch.no_grad():
        wanted = network(x)
    (found,) = lowered.graph.run(x)
    best, second = wanted.topk(2, 1)[0].unbind(1)
    same = (found.argmax(1) == wanted.argmax(1)).double()
    assert float(same.mean()) > SAME_CLASS
    assert float(same[best - second > CLEAR].mean()) > SAME_CLEAR_CLASS
