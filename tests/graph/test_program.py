"""A graph survives being written as an exported program and read again."""

import copy
import io
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from normfuse.graph import Graph, capture, verify
from normfuse.graph.program import to_module, to_program
from normfuse.passes.presets import CANONICAL, FOLD, LOWER
from normfuse.pipeline import Pipeline
from normfuse.testing import Small, randomized, seeded


def read_again(graph: Graph) -> Graph:
    file = io.BytesIO()
    torch.export.save(to_program(graph), file)
    file.seek(0)
    return capture(torch.export.load(file))


def operators(graph: Graph) -> list[str]:
    return [str(node.target) for node in graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize("is_folded", [False, True], ids=["captured", "folded"])
def test_a_round_trip_keeps_text_names_and_outputs(is_folded: bool) -> None:
    conv, norm, layer_norm = nn.Conv1d(2, 5, 3, stride=2, bias=False), nn.BatchNorm1d(5), nn.LayerNorm(5)
    head = nn.Linear(5, 3)
    parts = {"conv": conv, "norm": norm, "ln": layer_norm, "head": head}
    model = randomized(Small(lambda m, x: m.head(m.ln(m.norm(m.conv(x)).transpose(1, 2))[:, 0]), **parts))
    x = torch.randn(3, 2, 9, generator=seeded(0))
    graph = capture(model, (x,))
    if is_folded:
        Pipeline(phases=(CANONICAL, FOLD, LOWER)).run(graph)
    again = read_again(graph)
    verify(again)
    # torch names calls after their operators when it reads a program, so names that passes gave go once.
    assert operators(again) == operators(graph)
    assert is_folded or again.text() == graph.text()
    assert read_again(again).text() == again.text()
    assert again.input_names == graph.input_names
    assert again.output_names == graph.output_names
    assert again.has_dynamic_batch
    for batch in (1, 4):
        sample = torch.randn(batch, 2, 9, generator=seeded(batch))
        assert torch.equal(again.run(sample)[0], graph.run(sample)[0])


@pytest.mark.parametrize(
    "function",
    [
        pytest.param(lambda m, x: x + 1, id="one"),
        pytest.param(lambda m, x: {"logits": x + 1}, id="one with a name"),
        pytest.param(lambda m, x: (x + 1, x * 2), id="tuple"),
        pytest.param(lambda m, x: {"b": x + 1, "a": x * 2}, id="dict"),
        pytest.param(lambda m, x: (x + 1, x), id="an input"),
        pytest.param(lambda m, x: {"a": (y := x + 1), "b": y}, id="twice the same"),
    ],
)
def test_output_names_survive(function: Callable[[Any, Tensor], Any]) -> None:
    x = torch.randn(3, 5, generator=seeded(0))
    graph = capture(Small(function), (x,))
    again = read_again(graph)
    assert again.output_names == graph.output_names
    assert all(map(torch.equal, again.run(x), graph.run(x)))


def test_a_static_batch_survives() -> None:
    graph = capture(Small(lambda m, x: x.reshape(3, 35) + torch.ones(3, 35)), torch.randn(3, 5, 7, generator=seeded(0)))
    again = read_again(graph)
    assert again.notes == graph.notes != ()
    assert again.text() == graph.text()


def test_several_inputs_keep_their_order() -> None:
    class Two(nn.Module):
        def forward(self, zebra: Tensor, ape: Tensor) -> Tensor:
            return zebra - ape

    zebra, ape = torch.randn(2, 3, 5, generator=seeded(0)), torch.randn(2, 3, 1, generator=seeded(1))
    again = read_again(capture(Two(), (zebra, ape)))
    assert again.input_names == ("zebra", "ape")
    assert torch.equal(again.run(zebra, ape)[0], zebra - ape)


class Pair(NamedTuple):
    """A result with names."""

    a: Tensor
    b: Tensor


@dataclass
class Result:
    """A result of the model's own class."""

    a: Tensor
    b: Tensor


torch.export.register_dataclass(Result)

RETURNED = [
    pytest.param(lambda m, x: x + 1, id="bare"),
    pytest.param(lambda m, x: (x + 1,), id="a tuple of one"),
    pytest.param(lambda m, x: {"output": x + 1}, id="a name like the default"),
    pytest.param(lambda m, x: {"output_0": x + 1, "output_1": x * 2}, id="names like the defaults"),
    pytest.param(lambda m, x: {"a": x + 1, "h": [x * 2, (x, x * 3)]}, id="nested"),
    pytest.param(lambda m, x: (x + 1, None), id="nothing behind"),
    pytest.param(lambda m, x: (None, x + 1, x), id="nothing in front"),
    pytest.param(lambda m, x: [x + 1, x * 2], id="list"),
    pytest.param(lambda m, x: [x + 1], id="a list of one"),
    pytest.param(lambda m, x: {0: x + 1, 1: x}, id="keys that are numbers"),
]


@pytest.mark.parametrize("function", RETURNED)
def test_what_is_returned_is_nested_as_it_was(function: Callable[[Any, Tensor], Any]) -> None:
    x = torch.randn(3, 5, generator=seeded(0))
    graph = capture(Small(function), (x,))
    for module in (to_module(graph), pickle.loads(pickle.dumps(to_module(graph))), to_program(graph).module()):
        found, expected = module(x), function(None, x)
        assert pytree.tree_structure(found) == pytree.tree_structure(expected)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    again = read_again(graph)
    assert again.returned == graph.returned
    assert again.output_names == graph.output_names


def test_a_named_tuple_has_its_class_in_the_module_and_its_names_in_the_file() -> None:
    x = torch.randn(3, 5, generator=seeded(0))
    graph = capture(Small(lambda m, x: (Pair(x + 1, x), x)), (x,))
    (pair, _), (named, _) = to_module(graph)(x), to_program(graph).module()(x)
    assert type(pair) is Pair
    assert torch.equal(pair.a, x + 1)
    assert list(named) == ["a", "b"]
    assert read_again(graph).returned == ({"a": 0, "b": 1}, 2)


def test_a_class_of_the_models_own_is_a_dict_by_field() -> None:
    x = torch.randn(3, 5, generator=seeded(0))
    graph = capture(Small(lambda m, x: Result(x + 1, x)), (x,))
    assert graph.output_names == ("a", "b")
    for found in (to_module(graph)(x), to_program(graph).module()(x)):
        assert torch.equal(found["a"], x + 1)


def test_the_module_takes_the_sizes_it_was_captured_with() -> None:
    """A constant of one position would broadcast over nine."""
    graph = capture(Small(lambda m, x: x * torch.ones(x.shape[1:])), (torch.randn(2, 3, 1, generator=seeded(0)),))
    own = to_module(graph)
    for module in (own, pickle.loads(pickle.dumps(own)), copy.deepcopy(own)):
        assert module(torch.ones(7, 3, 1)).shape == (7, 3, 1)
        with pytest.raises(AssertionError, match="axis 2 of input x is not 1"):
            module(torch.ones(2, 3, 9))
