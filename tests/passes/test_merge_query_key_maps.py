"""Queries and keys become one map per head, exactly behind a softmax, or stay for a stated reason (methods 10.4)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normfuse.graph import Graph, capture, ops, query
from normfuse.passes.merge_query_key_maps import MergeQueryKeyMaps, merged_maps
from normfuse.passes.presets import AFFINES, CANONICAL, LOWER, folds
from normfuse.pipeline import Pipeline
from normfuse.report import Reason
from normfuse.rewrite.linear_map import LinearMap
from normfuse.testing import (
    Golden,
    Small,
    check_pass_contract,
    distance,
    fold_tolerance,
    outputs,
    picture,
    randomized,
    sample,
)

EXACT = 1e-12
RULE = "scores-of-one-map"
HEADS, WIDTH, CHANNELS = 3, 2, 5


def parts() -> dict[str, nn.Module]:
    wide = {name: nn.Linear(CHANNELS, HEADS * WIDTH) for name in "qkv"}
    bare = {f"{name}_bare": nn.Linear(CHANNELS, HEADS * WIDTH, bias=False) for name in "qk"}
    other = {"k_other": nn.Linear(4, HEADS * WIDTH), "v_other": nn.Linear(4, HEADS * WIDTH)}
    return {**wide, **bare, **other, "joint": nn.Linear(CHANNELS, 3 * HEADS * WIDTH), "norm": nn.LayerNorm(WIDTH)}


def cut(x: Tensor) -> Tensor:
    return x.unflatten(-1, (HEADS, WIDTH)).transpose(1, 2)


def attend(m: Any, x: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(cut(m.q(x)), cut(m.k(x)), cut(m.v(x)))


def attend_jointly(m: Any, x: Tensor) -> Tensor:
    split = m.joint(x).unflatten(-1, (3, HEADS, WIDTH)).permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(*split.unbind())


def attend_masked(m: Any, x: Tensor) -> Tensor:
    scores = cut(m.q_bare(x)) @ cut(m.k(x)).mT * 0.3
    mask = torch.linspace(-1, 1, scores.shape[-1] ** 2, dtype=x.dtype).reshape(scores.shape[-2:])
    return (scores + mask).softmax(-1) @ cut(m.v(x))


def attend_with_one_head(m: Any, x: Tensor) -> Tensor:
    result: Tensor = (m.q(x) @ m.k(x).mT).softmax(-1) @ m.v(x)
    return result


def attend_across(m: Any, x: Tensor) -> Tensor:
    y = x[:, 1:4, :4].sigmoid()
    return F.scaled_dot_product_attention(cut(m.q(x)), cut(m.k_other(y)), cut(m.v_other(y)))


def ready(function: Any, dtype: torch.dtype = torch.float64) -> tuple[Graph, nn.Module, Tensor]:
    x = sample(4, 7, CHANNELS).to(dtype)
    model = randomized(Small(function, **parts())).to(dtype)
    graph = capture(model, (x,))
    Pipeline(phases=(CANONICAL, AFFINES, folds(), LOWER)).run(graph)
    return graph, model, x


def test_picture(golden: Golden) -> None:
    graph, _, _ = ready(attend, torch.float32)
    before = graph.text()
    MergeQueryKeyMaps().run(graph)
    assert picture(before, graph.text()) == golden


ATTENTIONS = [
    pytest.param(attend, id="three maps"),
    pytest.param(attend_jointly, id="a joint map"),
    pytest.param(attend_masked, id="no bias of queries, a mask"),
    pytest.param(attend_with_one_head, id="one head without an axis"),
    pytest.param(attend_across, id="keys of another tensor and width"),
]


@pytest.mark.parametrize("function", ATTENTIONS)
def test_the_attention_is_the_same(function: Any) -> None:
    graph, model, x = ready(function)
    maps = sum(query.is_call(node, ops.LINEAR) for node in graph.nodes)
    report = check_pass_contract(MergeQueryKeyMaps(), graph, (x,))
    MergeQueryKeyMaps().run(graph)
    assert report.applied == {RULE: 1}
    assert not report.refused
    assert sum(query.is_call(node, ops.LINEAR) for node in graph.nodes) == maps - 1
    assert distance(graph.run(x), outputs(model, x)) < EXACT


def test_it_holds_in_float32_up_to_rounding() -> None:
    graph, model, x = ready(attend, torch.float32)
    MergeQueryKeyMaps().run(graph)
    (found,), (wanted,) = graph.run(x), outputs(model, x)
    assert float((found - wanted).abs().max()) < fold_tolerance(graph, x)


def test_the_map_worked_out_by_hand() -> None:
    """Two heads of one channel: M = k q^T per head, d = k b."""
    queries = LinearMap(torch.tensor([[1.0, 2.0], [3.0, -1.0]]), torch.tensor([5.0, -2.0]), 2, 2)
    keys = LinearMap(torch.tensor([[1.0, 0.0, 2.0], [0.5, -1.0, 0.0]]), torch.tensor([9.0, 9.0]), 2, 2)
    found = merged_maps(queries, keys, heads=2)
    assert found.weight.tolist() == [[1, 2], [0, 0], [2, 4], [1.5, -0.5], [-3, 1], [0, 0]]
    assert found.bias is not None
    assert found.bias.tolist() == [5, 0, 10, -1, 2, 0]


def test_the_report_says_what_became_of_which_layers() -> None:
    graph, _, _ = ready(attend)
    (site,) = MergeQueryKeyMaps().run(graph).sites
    assert site["affine"] == "q and k"
    assert "75 weights for 60" in site["formula"]


def rotary(m: Any, x: Tensor) -> Tensor:
    angle = torch.arange(x.shape[1], dtype=x.dtype)[:, None]
    q, k = cut(m.q(x)) * angle.cos(), cut(m.k(x))
    return F.scaled_dot_product_attention(q, k, cut(m.v(x)))


def normed(m: Any, x: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(cut(m.q(x)), m.norm(cut(m.k(x))), cut(m.v(x)))


def shared(m: Any, x: Tensor) -> Tensor:
    k = m.k(x)
    return F.scaled_dot_product_attention(cut(m.q(x)), cut(k), cut(k))


def moved(m: Any, x: Tensor) -> Tensor:
    k = m.k(x).unflatten(-1, (WIDTH, HEADS)).permute(0, 3, 1, 2)  # channels of a head are not neighbours
    return F.scaled_dot_product_attention(cut(m.q(x)), k, cut(m.v(x)))


REFUSED = [
    pytest.param(rotary, Reason.NO_LINEAR, "queries", id="positions that turn queries (2)"),
    pytest.param(normed, Reason.NO_LINEAR, "keys", id="a norm of keys (2)"),
    pytest.param(moved, Reason.APART, "keys", id="heads cut in another way (2)"),
    pytest.param(shared, Reason.SHARED, "keys", id="keys are values too (3)"),
]


@pytest.mark.parametrize(("function", "reason", "what"), REFUSED)
def test_what_does_not_fit_stays_with_its_reason(function: Any, reason: Reason, what: str) -> None:
    graph, _, x = ready(function)
    report = check_pass_contract(MergeQueryKeyMaps(), graph, (x,))
    assert not report.applied
    (refusal,) = report.refused
    assert refusal.reason is reason
    assert refusal.detail.startswith(what)


def of_any_length(m: Any, x: Tensor) -> Tensor:
    batch, tokens, _ = x.shape
    q, k, v = (each(x).view(batch, tokens, HEADS, WIDTH).transpose(1, 2) for each in (m.q, m.k, m.v))
    return F.scaled_dot_product_attention(q, k, v)


def test_heads_of_any_number_of_tokens_and_samples_stay() -> None:
    x = sample(4, 7, CHANNELS)
    model = randomized(Small(of_any_length, **parts())).double()
    sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("tokens")}
    graph = capture(torch.export.export(model, (x,), dynamic_shapes=(sizes,)))
    Pipeline(phases=(CANONICAL, AFFINES, folds(), LOWER)).run(graph)
    (refusal,) = MergeQueryKeyMaps().run(graph).refused
    assert refusal.reason is Reason.NOT_STATIC


def test_constants_beyond_their_type_stay() -> None:
    graph, _, _ = ready(attend, torch.float32)
    for node in graph.nodes:
        if query.is_call(node, ops.LINEAR):
            query.constant(graph, query.operand(node, 1)).mul_(1e25)
    (refusal,) = MergeQueryKeyMaps().run(graph).refused
    assert refusal.reason is Reason.OVERFLOW


def not_over_keys(m: Any, x: Tensor) -> Tensor:
    return (cut(m.q(x)) @ cut(m.k(x)).mT).softmax(-2) @ cut(m.v(x))


def without_softmax(m: Any, x: Tensor) -> Tensor:
    return cut(m.q(x)) @ cut(m.k(x)).mT @ cut(m.v(x))


@pytest.mark.parametrize("function", [not_over_keys, without_softmax])
def test_products_that_are_no_scores_are_not_its_matter(function: Any) -> None:
    """There a bias of the keys would count (1)."""
    graph, _, x = ready(function)
    report = check_pass_contract(MergeQueryKeyMaps(), graph, (x,))
    assert not report.applied
    assert not report.refused
