"""Masks that come with every sample, however a model fills them in."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from integer_module import hold, hold_bits, lower, normal
from torch import Tensor, nn

from normfuse.errors import UnsupportedModel
from normfuse.quant.integer_forms import SoftmaxForm
from normfuse.recipe import Recipe
from normfuse.testing import randomized

WIDTH, TOKENS = 8, 5
SHIFTS = Recipe(integer_only=True, softmax=SoftmaxForm.SHIFTMAX)


class Attention(nn.Module):
    """One head whose scores a subclass masks."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        scores = self.q(x) @ self.k(x).transpose(1, 2) / WIDTH**0.5
        return torch.softmax(self.masked(scores, mask[:, None, :]), -1) @ self.v(x)

    def masked(self, scores: Tensor, mask: Tensor) -> Tensor:
        return scores.masked_fill(~mask, -math.inf)


class Chosen(Attention):
    def masked(self, scores: Tensor, mask: Tensor) -> Tensor:
        return torch.where(mask, scores, -1e9)


class OfNumbers(Attention):
    def masked(self, scores: Tensor, mask: Tensor) -> Tensor:
        return scores.masked_fill(mask == 0, -1e4)


class Padded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)

    def forward(self, x: Tensor, mask: Tensor) -> Any:
        return self.attention(x, x, x, key_padding_mask=~mask, need_weights=False)[0]


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 16, batch_first=True, activation="gelu")
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)

    def forward(self, x: Tensor, mask: Tensor) -> Any:
        return self.encoder(x, src_key_padding_mask=~mask)


def masks(count: int) -> Tensor:
    """Return masks of every length from one token on."""
    return torch.arange(TOKENS) <= (torch.arange(count) % TOKENS)[:, None]


def samples(count: int = 16) -> tuple[Tensor, Tensor]:
    return normal(count, TOKENS, WIDTH, seed=3), masks(count)


def made(model: type[nn.Module]) -> nn.Module:
    found: nn.Module = randomized(model().eval())
    return found


@pytest.mark.parametrize("model", [Attention, Chosen, Padded, Encoder])
def test_filled_masks(model: type[nn.Module]) -> None:
    lowered = lower(made(model), *samples())
    assert "int_attention" in lowered.operators
    hold(lowered, *samples())


def test_a_mask_of_numbers() -> None:
    x, mask = samples()
    lowered = lower(made(OfNumbers), x, mask.long())
    hold(lowered, x, mask.long())


@pytest.mark.parametrize("model", [Attention, Chosen, Padded])
def test_filled_masks_and_shiftmax(model: type[nn.Module]) -> None:
    lowered = lower(made(model), *samples(), recipe=SHIFTS)
    assert "shiftmax" in lowered.operators
    hold_bits(lowered, *samples())


def test_what_is_masked_counts_for_nothing() -> None:
    lowered = lower(made(Attention), *samples(), is_written=False)
    x, mask = samples(5)
    other = torch.where(mask[..., None], x, 50 * normal(5, TOKENS, WIDTH, seed=8))
    (found,), (same,) = lowered.graph.run(x, mask), lowered.graph.run(other, mask)
    assert torch.equal(found[mask], same[mask])


class Lowered(Attention):
    def masked(self, scores: Tensor, mask: Tensor) -> Tensor:
        return scores.masked_fill(~mask, -3.0)


def test_a_number_that_leaves_something_is_no_mask() -> None:
    with pytest.raises(UnsupportedModel, match=r"masked_fill|softmax"):
        lower(made(Lowered), *samples())


class Returned(Attention):
    def forward(self, x: Tensor, mask: Tensor) -> Any:
        scores = (self.q(x) @ self.k(x).transpose(1, 2)).masked_fill(~mask[:, None, :], -1e9)
        return torch.softmax(scores, -1) @ self.v(x), scores


def test_masked_scores_that_others_read_are_refused() -> None:
    with pytest.raises(UnsupportedModel):
        lower(made(Returned), *samples())


class Causal(Attention):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return nn.functional.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x), is_causal=True)


def test_causal_attention_by_shifts() -> None:
    lowered = lower(made(Causal), (TOKENS, WIDTH), recipe=SHIFTS)
    assert "shiftmax" in lowered.operators
    hold_bits(lowered, (TOKENS, WIDTH))
