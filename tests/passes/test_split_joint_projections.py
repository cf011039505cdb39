"""Joint projections become one linear map per part, exactly."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from normfuse.graph import Graph, capture, ops, verify
from normfuse.passes.canonicalize import Canonicalize
from normfuse.passes.split_joint_projections import SplitJointProjections


class Heads(nn.Module):
    """qkv with the part axis anywhere behind the tokens."""

    def __init__(self, part_axis: int) -> None:
        super().__init__()
        self.part_axis = part_axis
        self.qkv = nn.Linear(6, 3 * 2 * 5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        sizes = [2, 5]
        sizes.insert(self.part_axis, 3)
        parts = self.qkv(x).reshape(*x.shape[:2], *sizes).movedim(2 + self.part_axis, 0)
        q, k, v = parts.unbind(0)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


class Chunks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.joint = nn.Linear(6, 9, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        first, second = self.joint(x).split([4, 5], dim=-1)
        return first, second.relu()


class ReadWhole(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.joint = nn.Linear(6, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        whole = self.joint(x)
        return whole.chunk(2, dim=-1)[0], whole


def split(model: nn.Module, x: Tensor) -> tuple[Graph, tuple[Tensor, ...], tuple[Tensor, ...]]:
    graph = capture(model.eval(), [x])
    expected = graph.run(x)
    Canonicalize().run(graph)
    SplitJointProjections().run(graph)
    verify(graph)
    return graph, graph.run(x), expected


def linears(graph: Graph) -> int:
    return sum(node.target is ops.LINEAR for node in graph.nodes)


@pytest.mark.parametrize("part_axis", [0, 1, 2])
def test_heads_are_split_wherever_the_part_axis_stands(part_axis: int) -> None:
    graph, found, expected = split(Heads(part_axis), torch.randn(4, 7, 6))
    assert linears(graph) == 3
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_chunks_are_split() -> None:
    graph, found, expected = split(Chunks(), torch.randn(4, 7, 6))
    assert linears(graph) == 2
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_an_output_that_is_read_whole_stays_joint() -> None:
    graph, found, expected = split(ReadWhole(), torch.randn(4, 7, 6))
    assert linears(graph) == 1
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_a_second_run_changes_nothing() -> None:
    graph, _, _ = split(Heads(1), torch.randn(2, 3, 6))
    text = graph.text()
    assert not SplitJointProjections().run(graph).changed
    assert graph.text() == text
