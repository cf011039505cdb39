"""Attention spelled out: equal, its scale folded into q, open masks dropped, the rest refused with a reason."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normfuse.graph import Graph, capture, ops
from normfuse.passes.canonicalize import Canonicalize
from normfuse.passes.fold_constants import FoldConstants
from normfuse.passes.presets import CANONICAL, FOLD, LOWER
from normfuse.passes.spell_out_attention import SpellOutAttention
from normfuse.pipeline import Phase, Pipeline
from normfuse.report import Reason
from normfuse.testing import Golden, Small, check_pass_contract, distance, picture, randomized, seeded

TOKENS = 5
MASKS = {
    "row": torch.zeros(1, 1, TOKENS, TOKENS).index_fill(2, torch.tensor([2]), -torch.inf).double(),
    "corner": torch.zeros(1, 1, TOKENS, TOKENS)
    .masked_fill(torch.ones(TOKENS, TOKENS).triu(1) > 0, -torch.inf)
    .double(),
    "additive": torch.linspace(-2, 2, TOKENS * TOKENS).reshape(1, 1, TOKENS, TOKENS).double(),
}


def sample(*shape: int) -> Tensor:
    return torch.randn(shape, generator=seeded(9))


def attend(m: Any, x: Tensor, mask: Tensor | None = None, **options: Any) -> Tensor:
    q, k, v = (part(x).reshape(*x.shape[:2], 2, 4).transpose(1, 2) for part in (m.q, m.k, m.v))
    result: Tensor = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **options)
    return result


def model(function: Any, **parts: Tensor) -> nn.Module:
    return randomized(Small(function, q=nn.Linear(6, 8), k=nn.Linear(6, 8), v=nn.Linear(6, 8), **parts)).double()


def ready(original: nn.Module, x: Tensor) -> Graph:
    graph = capture(original, (x,))
    Pipeline(phases=(Phase("canonical", (Canonicalize(), FoldConstants())),)).run(graph)
    return graph


def count(graph: Graph, target: object) -> int:
    return sum(node.target is target for node in graph.nodes)


SPELLED = [
    pytest.param(attend, id="no mask"),
    pytest.param(lambda m, x: attend(m, x, scale=0.3), id="a scale of its own"),
    pytest.param(lambda m, x: attend(m, x, torch.ones(1, 1, 5, 5, dtype=torch.bool)), id="an open mask"),
    pytest.param(lambda m, x: attend(m, x, m.additive), id="an additive mask"),
    pytest.param(lambda m, x: attend(m, x, m.additive.expand(x.shape[0], 2, 5, 5)), id="an additive mask, expanded"),
    pytest.param(lambda m, x: attend(m, x, m.additive.expand(x.shape[0], 2, 5, 5).mT), id="an additive mask, turned"),
    pytest.param(lambda m, x: attend(m, x, m.corner, scale=0.3), id="shut positions"),
    pytest.param(lambda m, x: attend(m, x, m.corner > -1), id="a boolean mask"),
    pytest.param(lambda m, x: attend(m, x, m.row), id="a shut row"),
    pytest.param(lambda m, x: attend(m, x, m.row > -1), id="a shut row, boolean"),
    pytest.param(lambda m, x: attend(m, x, m.row.expand(x.shape[0], 2, 5, 5)), id="a shut row, expanded"),
    pytest.param(lambda m, x: attend(m, x, m.row[..., :1]), id="a shut row, one column for all"),
    pytest.param(lambda m, x: attend(m, x, m.row[0, 0, 2:3]), id="nothing but shut rows"),
]


def test_picture(golden: Golden) -> None:
    graph = ready(model(SPELLED[8].values[0], **MASKS), sample(3, TOKENS, 6).double())
    before = graph.text()
    SpellOutAttention().run(graph)
    assert picture(before, graph.text()) == golden


@pytest.mark.parametrize("function", SPELLED)
def test_numbers_and_contract(function: Any) -> None:
    x = sample(3, TOKENS, 6).double()
    original = model(function, **MASKS)
    graph = ready(original, x)
    assert check_pass_contract(SpellOutAttention(), graph, (x,)).changed
    SpellOutAttention().run(graph)
    assert (count(graph, ops.ATTENTION), count(graph, ops.MATMUL)) == (0, 2)
    for batch in (3, 7):
        x = sample(batch, TOKENS, 6).double()
        # Sums of at most 8 products in float64, in another order.
        assert distance(graph.run(x), [original(x)]) < 1e-13


def test_the_scale_goes_into_q() -> None:
    original, x = model(lambda m, x: attend(m, x, scale=0.3)), sample(3, TOKENS, 6).double()
    graph = capture(original, (x,))
    Pipeline(phases=(CANONICAL, FOLD, LOWER)).run(graph)
    assert count(graph, ops.MUL) == 0
    assert distance(graph.run(x), [original(x)]) < 1e-13


@pytest.mark.parametrize(
    ("function", "detail"),
    [
        pytest.param(lambda m, x: attend(m, x, is_causal=True), "causal or grouped attention", id="causal (1)"),
        pytest.param(
            lambda m, x: attend(m, x, m.corner.expand(x.shape[0], 2, 5, 5).mT),
            "a mask that is not constant",
            id="shut positions behind a view (2)",
        ),
        pytest.param(
            lambda m, x: attend(m, x, (m.corner > -1).expand(x.shape[0], 2, 5, 5).mT),
            "a mask that is not constant",
            id="a boolean mask behind a view (2)",
        ),
        pytest.param(
            lambda m, x: attend(m, x, x[:, None, :, :5] > -9), "a mask that is not constant", id="boolean (2)"
        ),
        pytest.param(
            lambda m, x: attend(m, x, x[:, None, :, :5].log()), "a mask that is not constant", id="from the input (2)"
        ),
    ],
)
def test_refusals(function: Any, detail: str) -> None:
    x = sample(3, TOKENS, 6).double()
    x[:, 2] = 0  # log makes a shut row of it
    x = x.abs()
    original = model(function, **MASKS)
    graph = ready(original, x)
    before = graph.text()
    report = SpellOutAttention().run(graph)
    assert [(refusal.reason, refusal.detail) for refusal in report.refused] == [(Reason.UNKNOWN_OPERATOR, detail)]
    assert graph.text() == before
    assert not report.changed
    assert distance(graph.run(x), [original(x)]) < 1e-13
    assert bool(graph.run(x)[0].isfinite().all())
