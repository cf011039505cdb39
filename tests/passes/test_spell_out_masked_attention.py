"""Attention under a boolean mask spelled out: equal, and the rest refused with a reason."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normfuse.graph import Graph, capture, ops
from normfuse.integer.roles import is_masked
from normfuse.passes.canonicalize import Canonicalize
from normfuse.passes.fold_constants import FoldConstants
from normfuse.passes.spell_out_masked_attention import SpellOutMaskedAttention
from normfuse.pipeline import Phase, Pipeline
from normfuse.report import Reason
from normfuse.testing import Golden, check_pass_contract, distance, picture, randomized, seeded

TOKENS = 5


class Attention(nn.Module):
    """Two heads under a mask that comes with every sample."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(6, 8) for _ in range(3))
        self.options = options

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Return [batch, heads, tokens, channels]."""
        q, k, v = (part(x).reshape(*x.shape[:2], 2, 4).transpose(1, 2) for part in (self.q, self.k, self.v))
        if self.options.get("is_causal"):
            return F.scaled_dot_product_attention(q, k, v, **self.options)
        shown = mask[:, None, None] if mask.ndim == 2 else mask[:, None]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=shown, **self.options)


def samples(count: int) -> tuple[Tensor, Tensor]:
    """Return tokens, and so many of them that are open: one at least."""
    lengths = 1 + torch.arange(count) % TOKENS
    return torch.randn(count, TOKENS, 6, generator=seeded(9)).double(), torch.arange(TOKENS) < lengths[:, None]


def ready(original: nn.Module, inputs: tuple[Tensor, ...]) -> Graph:
    graph = capture(original, inputs)
    Pipeline(phases=(Phase("canonical", (Canonicalize(), FoldConstants())),)).run(graph)
    return graph


def test_picture(golden: Golden) -> None:
    graph = ready(randomized(Attention()).double(), samples(3))
    before = graph.text()
    SpellOutMaskedAttention().run(graph)
    assert picture(before, graph.text()) == golden


@pytest.mark.parametrize("options", [{}, {"scale": 0.3}], ids=["no scale", "a scale of its own"])
@pytest.mark.parametrize("is_square", [False, True], ids=["keys", "queries and keys"])
def test_numbers_and_contract(options: dict[str, Any], is_square: bool) -> None:
    original = randomized(Attention(**options)).double()

    def inputs(count: int) -> tuple[Tensor, Tensor]:
        x, mask = samples(count)
        return x, (mask[:, :, None] | mask[:, None]) if is_square else mask

    graph = ready(original, inputs(3))
    report = check_pass_contract(SpellOutMaskedAttention(), graph, inputs(3))
    assert report.applied == {"masked-attention-is-products": 1}
    SpellOutMaskedAttention().run(graph)
    assert not any(node.target is ops.ATTENTION for node in graph.nodes)
    assert sum(map(is_masked, graph.nodes)) == 1
    for count in (3, 7):
        # Sums of at most 8 products in float64, in another order.
        assert distance(graph.run(*inputs(count)), [original(*inputs(count))]) < 1e-13


def test_a_row_that_is_shut_is_no_nan() -> None:
    x, mask = samples(3)
    graph = ready(randomized(Attention()).double(), (x, mask))
    SpellOutMaskedAttention().run(graph)
    assert bool(graph.run(x, mask & False)[0].isfinite().all())


REFUSED = [
    pytest.param(Attention(is_causal=True), False, "causal or grouped attention", id="causal (2)"),
    pytest.param(Attention(), True, "a mask that is not boolean", id="a float mask (1)"),
]


@pytest.mark.parametrize(("original", "is_float", "detail"), REFUSED)
def test_refusals(original: nn.Module, is_float: bool, detail: str) -> None:
    x, mask = samples(3)
    graph = ready(randomized(original).double(), (x, mask.double() if is_float else mask))
    before = graph.text()
    report = SpellOutMaskedAttention().run(graph)
    assert [(refusal.reason, refusal.detail) for refusal in report.refused] == [(Reason.UNKNOWN_OPERATOR, detail)]
    assert graph.text() == before
    assert not report.changed
