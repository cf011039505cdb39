"""Edits keep values, provenance and other readers as they are."""

import pytest
import torch
from torch import Tensor, fx, nn

from normfuse.errors import InternalError
from normfuse.graph import Graph, capture, ops, query, verify
from normfuse.graph.edit import Editor, editing
from normfuse.testing import Small, seeded


def sample(*shape: int) -> Tensor:
    return torch.randn(shape, generator=seeded(7))


def shared() -> Graph:
    """One linear layer, called twice."""
    return capture(Small(lambda m, x: m.f(x) * m.f(x.relu()), f=nn.Linear(5, 3)), sample(4, 5))


def linears(graph: Graph) -> list[fx.Node]:
    return [node for node in graph.nodes if query.is_call(node, ops.LINEAR)]


def test_a_new_call_has_value_and_provenance() -> None:
    graph = capture(Small(lambda m, x: m.f(x).sum(1), f=nn.Linear(5, 3)), sample(4, 5))
    (first,) = linears(graph)
    with editing(graph) as edit:
        new = edit.replace(first, ops.RELU, first.args[0])
    assert query.shape(new)[1:] == (5,)
    assert query.layer_of(new) == "f"
    assert query.source_line(new) == query.source_line(first) != ""
    verify(graph)


def test_a_replaced_call_reads_itself_no_more() -> None:
    graph, x = shared(), sample(4, 5)
    expected = graph.run(x)[0]
    (first, second) = linears(graph)
    with editing(graph) as edit:
        doubled = edit.call(ops.ADD, first, first, at=first, after=True)
        edit.redirect(first, doubled)
    verify(graph)
    torch.testing.assert_close(graph.run(x)[0], expected * 2)
    assert second in graph.nodes


def test_only_some_readers_are_redirected() -> None:
    graph, x = capture(Small(lambda m, x: (y := x + 1.0).relu() + y.abs()), sample(4, 5)), sample(4, 5)
    add = next(node for node in graph.nodes if query.is_call(node, ops.ADD))
    with editing(graph) as edit:
        edit.redirect(add, graph.inputs[0], only=lambda reader: query.is_call(reader, ops.RELU))
    torch.testing.assert_close(graph.run(x)[0], x.relu() + (x + 1).abs())


def test_a_constant_of_its_own_keeps_its_name() -> None:
    graph = capture(nn.Linear(5, 3), sample(4, 5))
    old = graph.module.get_buffer("weight")
    with editing(graph) as edit:
        edit.set_constant(linears(graph)[0], 1, torch.zeros(3, 5), "other")
    assert dict(graph.module.named_buffers()).keys() == {"weight", "bias"}
    assert bool(old.any())
    verify(graph)


def test_a_shared_constant_is_left_to_its_other_reader() -> None:
    graph, x = shared(), sample(4, 5)
    first, second = linears(graph)
    with editing(graph) as edit:
        edit.set_constant(first, 1, torch.zeros(3, 5), "f.weight")
        edit.set_constant(first, 2, torch.ones(3), "f.bias")
    verify(graph)
    constants = dict(graph.module.named_buffers())
    expected = nn.functional.linear(x.relu(), constants["f.weight"], constants["f.bias"])
    assert torch.equal(graph.run(x)[0], expected)
    assert str(second.args[1].target) == "f.weight"  # type: ignore[union-attr]


def test_a_constant_may_change_its_shape() -> None:
    graph = capture(nn.Linear(5, 3, bias=False), sample(4, 5))
    with editing(graph) as edit:
        edit.set_constant(linears(graph)[0], 1, torch.zeros(2, 5), "weight")
        edit.set_constant(linears(graph)[0], 2, torch.zeros(2), "bias")
    verify(graph)
    assert graph.output_specs[0].shape == (None, 2)
    assert graph.run(sample(7, 5))[0].shape == (7, 2)


@pytest.mark.parametrize("name", ["f.weight", "f", "f.weight.extra", "new"])
def test_names_of_new_constants_are_free(name: str) -> None:
    graph, x = shared(), sample(4, 5)
    expected = graph.run(x)[0]
    (first, _) = linears(graph)
    with editing(graph) as edit:
        constants = [edit.constant(torch.full((3,), 2.0), name, like=first) for _ in range(2)]
        scaled = edit.call(ops.MUL, first, constants[0], at=first, after=True)
        twice = edit.call(ops.MUL, scaled, constants[1], at=scaled, after=True)
        edit.redirect(first, twice, only=lambda reader: reader is not scaled)
    verify(graph)
    first_branch = next(node for node in graph.nodes if query.is_call(node, ops.MUL))
    assert first_branch.args[0] is first
    assert len({str(node.target) for node in graph.nodes if node.op == "get_attr"}) == 4
    torch.testing.assert_close(graph.run(x)[0], expected * 4)


def test_a_label_that_is_a_constant_of_the_user() -> None:
    """The sum is called ``add`` and so is the user's parameter; ``add.affine_scale`` cannot be."""
    graph = capture(Small(lambda m, x: x + m.add, add=torch.ones(5)), sample(4, 5))
    with editing(graph) as edit:
        node = next(node for node in graph.nodes if query.is_call(node, ops.ADD))
        scale = edit.constant(torch.full((5,), 3.0), "add.affine_scale", like=node)
        product = edit.call(ops.MUL, node, scale, at=node, after=True)
        edit.redirect(node, product)
    verify(graph)
    torch.testing.assert_close(graph.run(x := sample(4, 5))[0], (x + 1) * 3)


def test_dead_code_and_dead_constants_go() -> None:
    graph = capture(Small(lambda m, x: x.relu() + m.c * 2, c=torch.ones(5)), sample(4, 5))
    add = next(node for node in graph.nodes if query.is_call(node, ops.ADD))
    with editing(graph) as edit:
        edit.redirect(add, add.args[0])  # type: ignore[arg-type]
    assert [str(node.target) for node in graph.nodes] == ["x", "aten.relu.default", "output"]
    assert list(graph.module.buffers()) == []


def test_a_graph_without_values_is_our_bug() -> None:
    graph = shared()
    for node in graph.nodes:
        node.meta.pop("val", None)
    with pytest.raises(InternalError, match="no fake values"):
        Editor(graph).constant(torch.ones(3), "new")
