"""Joint projections become one linear map per part, exactly, and only if the joint output is made no more."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normfuse.graph import Graph, capture, ops, query
from normfuse.passes.canonicalize import Canonicalize
from normfuse.passes.split_joint_projections import SplitJointProjections
from normfuse.testing import Golden, Small, check_pass_contract, distance, picture, randomized, sample

PARTS, HEADS, WIDTH = 3, 2, 5


def model(function: Any) -> nn.Module:
    joint = nn.Linear(6, PARTS * HEADS * WIDTH)
    return randomized(Small(function, joint=joint, plain=nn.Linear(6, 9, bias=False))).double()


def ready(function: Any, x: Tensor) -> Graph:
    graph = capture(model(function), (x,))
    Canonicalize().run(graph)
    return graph


def linears(graph: Graph) -> int:
    return sum(query.is_call(node, ops.LINEAR) for node in graph.nodes)


def heads(m: Any, x: Tensor, part_axis: int = 0) -> Tensor:
    """Return the parts [parts, batch, tokens, heads, width], with the part axis anywhere behind the tokens."""
    sizes = [HEADS, WIDTH]
    sizes.insert(part_axis, PARTS)
    parts: Tensor = m.joint(x).reshape(*x.shape[:2], *sizes).movedim(2 + part_axis, 0)
    return parts


def attention(m: Any, x: Tensor) -> Tensor:
    q, k, v = heads(m, x).permute(0, 1, 3, 2, 4).unbind(0)
    return torch.softmax(q @ k.mT, dim=-1) @ v


def test_picture(golden: Golden) -> None:
    graph = ready(attention, sample(4, 7, 6))
    before = graph.text()
    SplitJointProjections().run(graph)
    assert picture(before, graph.text()) == golden


SPLIT = [
    pytest.param(attention, 3, id="attention"),
    pytest.param(lambda m, x: heads(m, x, 0).unbind(0), 3, id="the part axis first"),
    pytest.param(lambda m, x: heads(m, x, 1).unbind(0), 3, id="the part axis between"),
    pytest.param(lambda m, x: heads(m, x, 2).unbind(0), 3, id="the part axis last"),
    pytest.param(lambda m, x: tuple(heads(m, x)[i] for i in (-1, 0, 1)), 3, id="selected, one from behind"),
    pytest.param(lambda m, x: heads(m, x)[1], 1, id="one part alone"),
    pytest.param(
        lambda m, x: m.joint(x).reshape(x.shape[0], 7, PARTS, HEADS, WIDTH).permute(2, 0, 3, -4, -1).unbind(0),
        3,
        id="a permute that counts from behind",
    ),
    pytest.param(lambda m, x: m.plain(x).split([4, 5], dim=-1), 2, id="split of unequal sizes"),
    pytest.param(lambda m, x: m.joint(x).chunk(3, dim=2), 3, id="chunks"),
    pytest.param(lambda m, x: (*m.joint(x).chunk(3, dim=-1), *heads(m, x).unbind(0)), 6, id="chunks and heads"),
    pytest.param(lambda m, x: m.joint(x[:, 0]).split(10, dim=-1), 3, id="no tokens"),
]


@pytest.mark.parametrize(("function", "parts"), SPLIT)
def test_numbers_and_contract(function: Any, parts: int) -> None:
    x = sample(4, 7, 6)
    graph = ready(function, x)
    assert check_pass_contract(SplitJointProjections(), graph, (x,)).changed
    SplitJointProjections().run(graph)
    assert linears(graph) == parts
    for batch in (4, 3):
        x = sample(batch, 7, 6)
        expected = model(function)(x)
        # Sums of six products in float64, perhaps in another order.
        assert distance(graph.run(x), [expected] if isinstance(expected, Tensor) else expected) < 1e-14


@pytest.mark.parametrize(
    "function",
    [
        pytest.param(lambda m, x: ((y := m.joint(x)), y.chunk(2, dim=-1)[0]), id="read whole"),
        pytest.param(lambda m, x: ((y := m.joint(x))[:, 0], *y.chunk(3, dim=-1)), id="a token is selected besides"),
        pytest.param(lambda m, x: ((h := heads(m, x)).permute(2, 0, 1, 3, 4)[0], h[0]), id="a token, of heads"),
        pytest.param(
            lambda m, x: ((y := m.joint(x)).chunk(3, dim=-1)[0], y.reshape(-1, 7, 3, 10).chunk(3, dim=2)[0]),
            id="the heads are cut, not selected",
        ),
        pytest.param(lambda m, x: m.joint(x).split([3, 4], dim=1), id="the tokens are cut"),
        pytest.param(lambda m, x: m.joint(x).reshape(-1, PARTS, 10).permute(1, 0, 2)[0], id="the tokens are merged"),
        pytest.param(lambda m, x: F.linear(x, m.plain.weight * x.mean()).chunk(3, dim=-1), id="the weight varies"),
    ],
)
def test_other_outputs_stay_joint(function: Any) -> None:
    x = sample(4, 7, 6)
    graph = ready(function, x)
    before = graph.text()
    report = SplitJointProjections().run(graph)
    assert not report.changed
    assert graph.text() == before
    assert linears(graph) == 1
