"""Graphs run, copy and convert without sharing what may change."""

import copy

import torch
from torch import Tensor, fx, nn

from normfuse.graph import Graph, capture, ops, query, verify
from normfuse.graph.edit import Editor, converted
from normfuse.testing import Small, distance, randomized, seeded


def model() -> nn.Module:
    return randomized(nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Softmax(-1), nn.Linear(7, 3)))


def sample(*shape: int) -> Tensor:
    return torch.randn(shape, generator=seeded(7))


def small_graph() -> Graph:
    return capture(model(), (sample(4, 5),))


def test_constants_are_counted_once() -> None:
    assert small_graph().constant_bytes() == 4 * (5 * 7 + 7 + 7 + 7 + 7 * 3 + 3)


def test_a_copy_is_independent() -> None:
    graph, x = small_graph(), sample(4, 5)
    before, expected = graph.text(), graph.run(x)[0]
    trial = graph.copy()
    (linear, *_) = [node for node in trial.nodes if query.is_call(node, ops.LINEAR)]
    edit = Editor(trial)
    edit.set_constant(linear, 1, torch.zeros(7, 5), "weight")
    edit.replace(linear, ops.RELU, edit.call(ops.ADD, linear.args[0], 1.0, at=linear))
    edit.finish()
    assert graph.text() == before
    assert torch.equal(graph.run(x)[0], expected)


def test_what_was_kept_comes_back() -> None:
    graph, x = small_graph(), sample(4, 5)
    before, expected, kept = graph.text(), graph.run(x)[0], graph.snapshot()
    (linear, *_) = [node for node in graph.nodes if query.is_call(node, ops.LINEAR)]
    edit = Editor(graph)
    edit.set_constant(linear, 1, torch.zeros(7, 5), "weight")
    edit.redirect(linear, edit.call(ops.ADD, linear, 1.0, at=linear, after=True), only=lambda node: node.op == "output")
    edit.finish()
    graph.restore(kept)
    verify(graph)
    assert graph.text() == before
    assert torch.equal(graph.run(x)[0], expected)


def test_a_copy_shares_the_constants() -> None:
    graph = small_graph()
    addresses = [{tensor.data_ptr() for tensor in each.module.buffers()} for each in (graph, graph.copy())]
    assert addresses[0] == addresses[1]


def test_the_users_module_is_not_touched() -> None:
    user = model()
    state = copy.deepcopy(user.state_dict())
    graph = capture(user, (sample(4, 5),))
    for tensor in graph.module.buffers():
        assert not tensor.requires_grad
    linear = next(node for node in graph.nodes if query.is_call(node, ops.LINEAR))
    Editor(graph).set_constant(linear, 1, torch.zeros(7, 5), "weight")
    assert all(torch.equal(user.state_dict()[key], value) for key, value in state.items())


def test_watching_sees_and_replaces_values() -> None:
    graph, x, seen = small_graph(), sample(4, 5), list[str]()

    def watch(node: fx.Node, value: Tensor) -> Tensor:
        seen.append(node.name)
        return value * 0 if query.is_call(node, ops.SOFTMAX) else value

    (result,) = graph.run_watched([x], watch)
    bias = dict(graph.module.named_buffers())["3.bias"]
    assert seen == [node.name for node in graph.nodes if node.op in ("placeholder", "call_function")]
    assert torch.equal(result, bias.expand(4, 3))


def test_converted_computes_in_the_other_type_everywhere() -> None:
    def function(m: nn.Module, x: Tensor) -> Tensor:
        scores = torch.softmax(x.half(), -1, torch.float32)  # a type by position, a cast, a new constant
        return scores.type_as(x) + torch.ones(5, dtype=torch.float32) + x.float().mean(dim=0, dtype=torch.float32)

    graph = capture(Small(function), sample(4, 5))
    wide = converted(graph, torch.float64)
    verify(wide)
    x = sample(4, 5).double()
    expected = torch.softmax(x, -1) + 1 + x.mean(dim=0)
    assert "f32" not in wide.text()
    assert "f16" not in wide.text()
    assert distance(wide.run(x), [expected]) < 1e-14
    assert graph.input_specs[0].dtype == torch.float32


def test_converted_agrees_with_the_converted_module() -> None:
    graph, x = small_graph(), sample(4, 5).double()
    wide = converted(graph, torch.float64)
    # float32 constants widened are the same numbers, so only rounding of sums may differ.
    assert distance(wide.run(x), [model().double()(x)]) < 1e-14


def test_readers_come_in_graph_order_whatever_was_rewritten() -> None:
    graph = capture(Small(lambda m, x: (y := x.relu()).neg() + y.abs() * y), sample(4, 5))
    relu = next(node for node in graph.nodes if query.is_call(node, ops.RELU))
    edit = Editor(graph)
    edit.replace(query.readers(relu)[0], ops.GELU, relu)
    order = list(graph.nodes)
    found = query.readers(relu)
    assert len(found) == 3
    assert found == sorted(found, key=order.index)
