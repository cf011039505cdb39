"""Every invariant is noticed when it is broken, by name and with the node."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import fx, nn

from normfuse.errors import InternalError
from normfuse.graph import Graph, capture, ops, query, verify
from normfuse.graph.edit import Editor
from normfuse.graph.verify import INVARIANTS
from normfuse.testing import seeded

ATEN = ops.ATEN


def small_graph() -> Graph:
    return capture(nn.Sequential(nn.Linear(5, 3), nn.ReLU()).eval(), (torch.randn(4, 5, generator=seeded(0)),))


def first(graph: Graph, *targets: object) -> fx.Node:
    return next(node for node in graph.nodes if query.is_call(node, *targets))


def change_in_place(graph: Graph) -> None:
    first(graph, ops.RELU).target = ATEN.relu_.default


def read_too_early(graph: Graph) -> None:
    first(graph, ops.LINEAR).prepend(first(graph, ops.RELU))


def forget_a_value(graph: Graph) -> None:
    del first(graph, ops.RELU).meta["val"]


def lose_a_constant(graph: Graph) -> None:
    del graph.module.get_submodule("0").weight


def share_a_constant(graph: Graph) -> None:
    linear = first(graph, ops.LINEAR)
    with graph.module.graph.inserting_before(linear):
        again = graph.module.graph.create_node("get_attr", "0.bias")
    again.meta.update(linear.args[2].meta)  # type: ignore[union-attr]
    linear.args = (*linear.args[:2], again)


def change_a_constant(graph: Graph) -> None:
    graph.module.get_submodule("0").bias = torch.zeros(3, dtype=torch.float64)


def normalize_by_the_batch(graph: Graph) -> None:
    relu, statistic = first(graph, ops.RELU), Editor(graph).constant(torch.ones(3), "statistic")
    x = relu.args[0]
    relu.target = ATEN._native_batch_norm_legit_functional.default
    relu.args = (x, None, None, statistic, statistic, True, 0.1, 1e-5)


def drop_out(graph: Graph) -> None:
    relu = first(graph, ops.RELU)
    relu.target, relu.args = ops.DROPOUT, (relu.args[0], 0.5, True)


def lose_an_output(graph: Graph) -> None:
    graph.output_names = ("first", "second")


def gain_an_input(graph: Graph) -> None:
    graph.input_names = (*graph.input_names, "second")


@pytest.mark.parametrize(
    ("breaker", "invariant", "culprit"),
    [
        pytest.param(change_in_place, "functional", "%relu", id="functional"),
        pytest.param(read_too_early, "in topological order", "%relu", id="topological"),
        pytest.param(forget_a_value, "fully valued", "%relu", id="valued"),
        pytest.param(lose_a_constant, "the owner of its constants", "constant 0.weight", id="lost constant"),
        pytest.param(share_a_constant, "the owner of its constants", "constant 0.bias", id="two owners"),
        pytest.param(change_a_constant, "the owner of its constants", "constant 0.bias", id="other type"),
        pytest.param(normalize_by_the_batch, "in eval mode", "batch_norm", id="batch statistics"),
        pytest.param(drop_out, "in eval mode", "aten.dropout", id="dropout"),
        pytest.param(lose_an_output, "named as captured", "", id="outputs"),
        pytest.param(gain_an_input, "named as captured", "", id="inputs"),
    ],
)
def test_a_broken_invariant_is_named(breaker: Callable[[Graph], None], invariant: str, culprit: str) -> None:
    graph = small_graph()
    verify(graph)
    breaker(graph)
    with pytest.raises(InternalError, match=f"a graph is not {invariant}") as caught:
        verify(graph)
    assert culprit in caught.value.where


def test_every_invariant_is_documented() -> None:
    text = (Path(__file__).parents[2] / "docs" / "invariants.md").read_text()
    assert all(f"**{name}**" in text for name in INVARIANTS)
