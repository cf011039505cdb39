"""Heads that are turned are the same attention, or stay for a documented reason (methods 12.1)."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normfuse.graph import Graph, capture, ops, query
from normfuse.passes.presets import AFFINES, CANONICAL, folds, rotations
from normfuse.passes.rotate_heads import RotateHeads
from normfuse.pipeline import Pipeline
from normfuse.report import Reason
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
WRONG = 1e-3


def ready(model: nn.Module, x: Tensor) -> Graph:
    graph = capture(model, (x,))
    Pipeline(phases=(CANONICAL, AFFINES, folds())).run(graph)
    return graph


def parts(width: int = 8) -> dict[str, nn.Module]:
    """Return projections of 5 channels to three heads of ``width`` and back."""
    wide = {name: nn.Linear(5, 3 * width) for name in "qkv"}
    return {**wide, "joint": nn.Linear(5, 9 * width), "o": nn.Linear(3 * width, 5)}


def cut(x: Tensor) -> Tensor:
    return x.unflatten(-1, (3, -1)).transpose(1, 2)


def joined(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


def attend(m: Any, x: Tensor) -> Tensor:
    result: Tensor = m.o(joined(F.scaled_dot_product_attention(cut(m.q(x)), cut(m.k(x)), cut(m.v(x)))))
    return result


def attend_jointly(m: Any, x: Tensor) -> Tensor:
    split = m.joint(x).unflatten(-1, (3, 3, 8)).permute(2, 0, 3, 1, 4)
    result: Tensor = m.o(joined(F.scaled_dot_product_attention(*split.unbind())))
    return result


def attend_with_bias(m: Any, x: Tensor) -> Tensor:
    scores = cut(m.q(x) + m.u) @ cut(m.k(x)).transpose(-1, -2) + m.table
    result: Tensor = m.o(joined(scores.softmax(-1) @ cut(m.v(x))))
    return result


def attend_linearly(m: Any, x: Tensor) -> Tensor:
    """Apply the values to the keys first: no softmax between them."""
    result: Tensor = m.o(joined(cut(m.q(x)) @ (cut(m.k(x)).transpose(-1, -2) @ cut(m.v(x)))))
    return result


def attend_with_norms(m: Any, x: Tensor) -> Tensor:
    q, k = F.rms_norm(cut(m.q(x)), (8,)), F.rms_norm(cut(m.k(x)), (8,))
    result: Tensor = m.o(joined(F.scaled_dot_product_attention(q, k, cut(m.v(x)), scale=0.7)))
    return result


MODELS = [
    pytest.param(attend, 2, id="three projections"),
    pytest.param(attend_jointly, 2, id="one projection"),
    pytest.param(attend_with_bias, 2, id="a table of biases"),
    pytest.param(attend_linearly, 2, id="linear attention"),
    pytest.param(attend_with_norms, 2, id="norms of queries and keys"),
]


def model_of(function: Any, **more: Any) -> nn.Module:
    tables = {"table": nn.Parameter(torch.ones(3, 7, 7)), "u": nn.Parameter(torch.ones(24))}
    return randomized(Small(function, **{**parts(), **tables, **more}))


@pytest.mark.parametrize(("function", "sites"), MODELS)
def test_numbers_and_contract(function: Any, sites: int) -> None:
    model, x = model_of(function).double(), sample(2, 7, 5)
    graph = ready(model, x)
    report = check_pass_contract(RotateHeads(seed=1), graph, (x,))
    assert report.applied == {"heads-turn": sites}
    assert report.refused == ()
    RotateHeads(seed=1).run(graph)
    assert distance(graph.run(x), outputs(model, x)) < EXACT
    assert distance(graph.run(x[:1]), outputs(model, x[:1])) < EXACT


def test_float32_differs_by_rounding() -> None:
    model, x = model_of(attend), sample(2, 7, 5).float()
    graph = ready(model, x)
    tolerance = fold_tolerance(graph, x)
    RotateHeads().run(graph)
    assert float((graph.run(x)[0] - outputs(model, x)[0]).abs().max()) < tolerance


def test_picture(golden: Golden) -> None:
    graph = ready(model_of(attend_with_bias), sample(2, 7, 5).float())
    before = graph.text()
    report = RotateHeads().run(graph)
    assert [site["into"] for site in report.sites] == ["q, k", "v, o"]
    assert picture(before, graph.text()) == golden


@pytest.mark.parametrize("name", ["q", "k", "v", "o"])
def test_every_change_is_needed(name: str) -> None:
    model, x = model_of(attend).double(), sample(2, 7, 5)
    graph = ready(model, x)
    kept = dict(graph.module.named_buffers())[f"{name}.weight"].clone()
    RotateHeads().run(graph)
    dict(graph.module.named_buffers())[f"{name}.weight"].copy_(kept)
    assert distance(graph.run(x), outputs(model, x)) > WRONG


def scores(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.transpose(-1, -2)


REFUSALS = [
    pytest.param(lambda m, x: scores(cut(m.q(x)), cut(m.k(x))), parts(5), Reason.TOO_SMALL, id="five channels (1)"),
    pytest.param(
        lambda m, x: scores(cut(m.q(x)), cut(m.k(x)) * m.cos), {"cos": sample(7, 8)}, Reason.NO_LINEAR, id="rotary (2)"
    ),
    pytest.param(
        lambda m, x: scores(cut(m.q(x)), cut(m.k(x)).softmax(-1)), {}, Reason.NO_LINEAR, id="a softmax of keys (2)"
    ),
    pytest.param(
        lambda m, x: (scores(q := cut(m.q(x)), cut(m.k(x))), q.sin()), {}, Reason.NONLINEAR_READER, id="shown too (3)"
    ),
    pytest.param(
        lambda m, x: x[:, None, :, :1].expand(-1, -1, -1, 7).softmax(-1) @ cut(m.v(x)),
        {},
        Reason.GRAPH_OUTPUT,
        id="values are the output (3)",
    ),
]


@pytest.mark.parametrize(("function", "more", "reason"), REFUSALS)
def test_refusals(function: Any, more: dict[str, Any], reason: Reason) -> None:
    model, x = model_of(function, **more).double(), sample(2, 7, 5)
    graph = ready(model, x)
    before = graph.text()
    report = RotateHeads().run(graph)
    assert {refusal.reason for refusal in report.refused} == {reason}
    assert graph.text() == before
    assert distance(graph.run(x), outputs(model, x)) < EXACT


def test_one_huge_channel_of_the_keys_is_spread() -> None:
    model: Any = model_of(attend).double()
    with torch.no_grad():
        model.k.bias[3] = 40.0
    graph, x = ready(model, sample(2, 7, 5)), sample(2, 7, 5)
    before = keys_of(graph, x)
    Pipeline(phases=(rotations(0),), given=frozenset(RotateHeads.requires)).run(graph)
    after = keys_of(graph, x)
    torch.testing.assert_close(after.square().sum(), before.square().sum())
    assert float(after.abs().max()) < float(before.abs().max()) / 1.7


def keys_of(graph: Graph, x: Tensor) -> Tensor:
    """Return the second factor of the first product: the keys, turned around."""
    product = next(node for node in graph.nodes if query.is_call(node, ops.MATMUL))
    found: dict[str, Tensor] = {}

    def watch(node: Any, value: Any) -> Any:
        found[node.name] = value
        return value

    graph.run_watched((x,), watch)
    return found[product.args[1].name]  # type: ignore[union-attr]
