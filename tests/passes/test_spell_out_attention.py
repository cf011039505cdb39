"""Attention spelled out: equal, its scale folded into q, open masks dropped, the rest refused."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normfuse.graph import Graph, capture, ops, verify
from normfuse.passes.presets import CANONICAL, FOLD, LOWER
from normfuse.pipeline import Pipeline
from normfuse.report import PassReport


class Attend(nn.Module):
    def __init__(self, mask: str) -> None:
        super().__init__()
        self.mask = mask
        self.q, self.k, self.v = (nn.Linear(6, 8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part(x).reshape(*x.shape[:2], 2, 4).transpose(1, 2) for part in (self.q, self.k, self.v))
        tokens = x.shape[1]
        masks = {
            "none": None,
            "open": torch.ones(1, 1, tokens, tokens, dtype=torch.bool),
            "float": torch.linspace(-2, 2, tokens * tokens).reshape(1, 1, tokens, tokens),
            "bool": torch.eye(tokens, dtype=torch.bool)[None, None],
        }
        if self.mask == "causal":
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=masks[self.mask], scale=0.3)


def fold(model: nn.Module, x: Tensor) -> tuple[Graph, list[PassReport]]:
    graph = capture(model.eval(), [x])
    reports = Pipeline(phases=(CANONICAL, FOLD, LOWER)).run(graph)
    verify(graph)
    return graph, reports


def count(graph: Graph, target: object) -> int:
    return sum(node.target is target for node in graph.nodes)


@pytest.mark.parametrize("mask", ["none", "open", "float"])
def test_attention_becomes_two_products_without_a_scale(mask: str) -> None:
    x = torch.randn(3, 5, 6)
    model = Attend(mask)
    graph, _ = fold(model, x)
    assert count(graph, ops.ATTENTION) == 0
    assert count(graph, ops.MATMUL) == 2
    assert count(graph, ops.MUL) == 0, "the scale went into q's linear map"
    torch.testing.assert_close(graph.run(x)[0], model(x))
    other = torch.randn(7, 5, 6)
    torch.testing.assert_close(graph.run(other)[0], model(other))


@pytest.mark.parametrize("mask", ["bool", "causal"])
def test_other_masks_are_left_whole_with_a_reason(mask: str) -> None:
    x = torch.randn(3, 5, 6)
    model = Attend(mask)
    graph, reports = fold(model, x)
    assert count(graph, ops.ATTENTION) == 1
    assert [refusal.detail for report in reports if report.name == "spell-out-attention" for refusal in report.refused]
    torch.testing.assert_close(graph.run(x)[0], model(x))
