"""Relevance on its way from the outputs to the inputs: small networks worked out by hand, and what holds of any."""

from __future__ import annotations

from collections.abc import Callable
from math import log
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from benchmarks.accuracy import folded
from examples.zoo.data import make
from examples.zoo.models import MODELS
from normfuse.errors import BadInput
from normfuse.graph import Graph, capture, ops, query
from normfuse.graph.edit import Editor, converted
from normfuse.graph.quantization import request_quantization
from normfuse.quant import IntegerType
from normfuse.rewrite.linear_map import LINEAR_MAPS
from normfuse.sensitivity.relevance import Relevance, relevance
from normfuse.sensitivity.relevance_call import Call, Shares
from normfuse.sensitivity.relevance_rules import RULES
from normfuse.sensitivity.targets import Target
from normfuse.testing import Small, randomized, seeded

EPS = torch.finfo(torch.float64).eps


def wide(*rows: object) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def matrix(*rows: list[float], bias: list[float] | None = None) -> nn.Linear:
    """A linear map of these weights, in float64."""
    layer = nn.Linear(len(rows[0]), len(rows), bias=bias is not None, dtype=torch.float64)
    layer.weight.data = wide(*rows)
    if bias is not None:
        layer.bias.data = wide(*bias)
    return layer


def captured(function: Callable[..., Any], *inputs: Tensor, **parts: nn.Module | Tensor) -> Graph:
    return capture(Several(function, **parts), inputs)


class Several(Small):
    """``Small`` with several inputs."""

    def forward(self, *inputs: Tensor) -> Any:
        return self._function(self, *inputs)


def start_at(given: Tensor) -> Target:
    """The relevance that the first output starts with, for every sample the same."""
    return lambda outputs: [given.expand_as(outputs[0]), *[None] * (len(outputs) - 1)]


def of_inputs(graph: Graph, inputs: tuple[Tensor, ...], **options: Any) -> tuple[Tensor, ...]:
    """The relevance of every input."""
    found = relevance(graph, inputs, keep=graph.inputs, **options)
    return tuple(found.kept[node] for node in graph.inputs)


def close(found: Tensor, expected: Tensor) -> None:
    """Equal but for the rounding of some ten operations on numbers about 1."""
    torch.testing.assert_close(found, expected, atol=16 * EPS, rtol=0)


def test_two_layers() -> None:
    """x = (2, -1): the hidden values are relu(3, 3, -3), the logits (6, 0) and a bias that gets nothing.

    Class 0: all of h contributes, 3 * 1 and 3 * 1 of 6, so R_h = (1/2, 1/2, 0). Into h_0 go x_0 * 1 = 2 and x_1 * -1
    = 1, of 3; into h_1 goes x_0 * 2 = 4 alone, as x_1 * 1 < 0. So R_x = (1/2 * 2/3 + 1/2, 1/2 * 1/3).
    """
    parts = {
        "a": matrix([1.0, -1.0], [2.0, 1.0], [-1.0, 1.0]),
        "b": matrix([1.0, 1.0, 2.0], [1.0, -1.0, 1.0], bias=[5.0, 0.0]),
    }
    x = wide([2.0, -1.0], [2.0, -1.0])
    graph = captured(lambda m, x: m.b(m.a(x).relu()), x, **parts)
    (found,) = of_inputs(graph, (x,))
    close(found, wide([5 / 6, 1 / 6]).expand(2, 2))


def spelled_out(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return m.projection((q @ k.transpose(-2, -1)).softmax(-1) @ v)  # type: ignore[no-any-return]


def fused(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return m.projection(F.scaled_dot_product_attention(q, k, v, scale=1.0))  # type: ignore[no-any-return]


@pytest.mark.parametrize("attention", [spelled_out, fused])
def test_attention(attention: Callable[..., Tensor]) -> None:
    """Two tokens of two features; the second feature of the first token is explained.

    Scores (ln 6, ln 2) give it probabilities (3/4, 1/4), so the values average to (4, 1/2), and the projection makes
    4 * 1 + 1/2 * 2 = 5 of them: R = (4/5, 1/5), S = R / (4, 1/2) = (1/5, 2/5). One half goes to the values, value *
    probability * S / 2. The other goes to the probabilities and through the softmax: 3/4 * (4/5 + 2/5) / 2 = 9/20 and
    1/4 * (4/5 - 2/5) / 2 = 1/20. Of these the query and the key get a half each; ln 6 is ln 3 * 1 + ln 2 * 1, and
    ln 2 is ln 3 * 0 + ln 2 * 1.
    """
    q = wide([[log(3), log(2)], [0.0, log(2)]])
    k = wide([[1.0, 1.0], [0.0, 1.0]])
    v = wide([[4.0, 1.0], [4.0, -1.0]])
    inputs = tuple(torch.cat([each, each]) for each in (q, k, v))
    graph = captured(attention, *inputs, projection=matrix([1.0, -2.0], [1.0, 2.0]))
    to_q, to_k, to_v = of_inputs(graph, inputs, target=start_at(wide([0.0, 1.0], [0.0, 0.0])))

    part = 9 / 40 / log(6)
    close(to_q, wide([[part * log(3), part * log(2) + 1 / 40], [0.0, 0.0]]).expand(2, 2, 2))
    close(to_k, wide([[part * log(3), part * log(2)], [0.0, 1 / 40]]).expand(2, 2, 2))
    close(to_v, wide([[3 / 10, 3 / 20], [1 / 10, -1 / 20]]).expand(2, 2, 2))


def test_residual_block() -> None:
    """y = x + W x, x = (1, 2): W x = (4, -1), y = (5, 1), explained by (1/2, 1/2).

    Gradient times input: the skip gets (1/10, 1), 11/10 in all, the branch (4/10, -5/10), -1/10 in all. So the skip's
    part is 11/12 and the branch's 1/12: all of the skip is scaled by 5/6, all of the branch by -5/6. In the branch, Z
    = (4, 1), S = (-1/12, 5/12), and x gets (2 * -1/12 + 5/12, 2 * -1/12).

    The second sample is scaled otherwise (x = (2, 1): W x = (5, 1), y = (7, 2), no cancellation): with the sums of the
    batch both would be wrong. There the skip gets (1/7, 1/4), the branch (5/14, 1/4), with Z = (5, 2), S = (1/14, 1/8).
    """
    x = wide([1.0, 2.0], [2.0, 1.0])
    graph = captured(lambda m, x: x + m.w(x), x, w=matrix([2.0, 1.0], [1.0, -1.0]))
    (found,) = of_inputs(graph, (x,), target=start_at(wide(1 / 2, 1 / 2)))
    close(found[0], wide(1 / 12 + 1 / 4, 5 / 6 - 1 / 6))
    close(found[1], wide(1 / 7 + 2 * (2 / 14 + 1 / 8), 1 / 4 + 1 / 14))


def window_shift(m: Any, x: Tensor) -> Tensor:
    """Two by two windows of an image of 4 by 6, shifted by one, all of a batch side by side (Swin)."""
    rolled = torch.roll(x, shifts=(-1, -1), dims=(1, 2))
    return rolled.view(-1, 2, 2, 3, 2, 5).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, 5)


def test_shifted_windows_are_exact() -> None:
    x = torch.rand(3, 4, 6, 5, generator=seeded(0), dtype=torch.float64)
    graph = captured(lambda m, x: window_shift(m, x).view(-1, 6, 4, 5), x)
    (given,) = graph.run(torch.rand(x.shape, generator=seeded(1), dtype=torch.float64))
    (found,) = of_inputs(graph, (x,), target=lambda outputs: [given])
    assert torch.equal(found, torch.rand(x.shape, generator=seeded(1), dtype=torch.float64))


def windows(m: Any, x: Tensor) -> Tensor:
    cut = m.a(window_shift(m, x))  # samples * 6 windows along the first axis
    mixed = m.c((m.b(cut).relu() + cut).mean(1))
    return m.d(mixed.view(-1, 6 * 5))  # type: ignore[no-any-return]


def heads_first(m: Any, x: Tensor) -> Tensor:
    """Heads along the first axis before the samples, [2 * n, ...]: the shapes do not tell the samples apart."""
    cut = torch.cat(m.a(x.flatten(1, 2)).split([2, 3], dim=2)[1:] * 2, dim=0)
    first, second = (cut + cut.mean(1, keepdim=True)).chunk(2, dim=0)
    return m.e((first - second / 2).mean(1))  # type: ignore[no-any-return]


def tokens_first(m: Any, x: Tensor) -> Tensor:
    """Samples along the second axis, [tokens, n, features]."""
    y = m.a(x.flatten(1, 2)).permute(1, 0, 2)
    return m.c((y + m.b(y.relu())).mean(0))  # type: ignore[no-any-return]


@pytest.mark.parametrize("function", [windows, heads_first, tokens_first])
def test_a_batch_gets_what_each_sample_alone_would(function: Callable[..., Tensor]) -> None:
    sizes = {"a": (5, 5), "b": (5, 5), "c": (5, 5), "d": (30, 3), "e": (3, 2)}
    parts = {name: randomized(nn.Linear(*size)).double() for name, size in sizes.items()}
    x = torch.randn(3, 4, 6, 5, generator=seeded(2), dtype=torch.float64)
    graph = captured(function, x, **parts)
    together = relevance(graph, [x], keep=graph.inputs)
    for at in range(3):
        alone = relevance(graph, [x[at : at + 1]], keep=graph.inputs)
        for node, expected in alone.absolute.items():
            torch.testing.assert_close(together.absolute[node][at : at + 1], expected, rtol=1e4 * EPS, atol=EPS)
        torch.testing.assert_close(together.conserved[at : at + 1], alone.conserved, rtol=1e4 * EPS, atol=0)
        expected = alone.kept[graph.inputs[0]]
        torch.testing.assert_close(together.kept[graph.inputs[0]][at : at + 1], expected, rtol=1e4 * EPS, atol=EPS)


def block(m: Any, x: Tensor) -> Tensor:
    y = F.scaled_dot_product_attention(m.q(x), m.k(x), m.v(x))
    x = F.layer_norm(x + m.o(y), (17,))
    x = x + m.down(F.gelu(m.up(x)))
    return m.head(x.mean(1))  # type: ignore[no-any-return]


def block_graph(*, has_bias: bool = False) -> tuple[Graph, Tensor]:
    sizes = {"up": (17, 29), "down": (29, 17), "head": (17, 4)}
    parts = {name: nn.Linear(*sizes.get(name, (17, 17)), bias=has_bias) for name in ("q", "k", "v", "o", *sizes)}
    x = torch.randn(2, 3, 17, generator=seeded(3), dtype=torch.float64)
    return captured(block, x, **{name: randomized(part).double() for name, part in parts.items()}), x


def test_nothing_is_lost_without_biases() -> None:
    """(And where every output has something that contributes positively: of 17 inputs, some do.)"""
    graph, x = block_graph()
    found = relevance(graph, [x])
    largest = max(float(each.max()) for each in found.absolute.values())
    operations = sum(query.is_tensor(node) for node in graph.nodes)
    tolerance = 29 * operations * largest * EPS  # each rounds what it shares out, in sums of at most 29 numbers
    torch.testing.assert_close(found.conserved, torch.ones_like(found.conserved), atol=tolerance, rtol=0)
    assert found.defaulted == ()
    assert not bool(found.absorbed.any())


def test_what_is_made_of_a_bias_alone_is_lost_and_counted() -> None:
    """The first of two logits is a bias; the other sample's is x_0, which gets all."""
    x = wide([0.0, 1.0], [2.0, 1.0])
    graph = captured(lambda m, x: m.a(x), x, a=matrix([1.0, 0.0], [0.0, 0.5], bias=[3.0, 0.0]))
    found = relevance(graph, [x], keep=graph.inputs)
    assert found.conserved.tolist() == [0.0, 1.0]
    assert found.kept[graph.inputs[0]].tolist() == [[0.0, 0.0], [1.0, 0.0]]


def test_a_rule_may_be_replaced() -> None:
    def to_the_first(call: Call, given: Tensor) -> Shares:
        return {call.activations[0]: given}

    x = wide([1.0, 2.0], [3.0, 4.0])
    graph = captured(lambda m, x: m.a(x) + x, x, a=matrix([1.0, 1.0], [1.0, 1.0]))
    found = relevance(graph, [x], rules={**RULES, ops.ADD: to_the_first}, keep=graph.nodes)
    (linear,) = (node for node in graph.nodes if query.is_call(node, ops.LINEAR))
    assert torch.equal(found.kept[linear], found.kept[graph.outputs[0]])


def test_a_rule_sees_the_call() -> None:
    seen = list[Call]()

    def rule(call: Call, given: Tensor) -> Shares:
        seen.append(call)
        return {call.activations[0]: given}

    x = wide([1.0, 2.0], [3.0, 4.0])
    graph = captured(lambda m, x: m.a(x), x, a=matrix([1.0, 1.0], [2.0, 1.0]))
    relevance(graph, [x], rules={ops.LINEAR: rule})
    (call,) = seen
    assert torch.equal(call.args[0], x)
    assert torch.equal(call.output, wide([3.0, 4.0], [7.0, 10.0]))
    assert call.relevances[0].tolist() == [[0.0, 1.0], [0.0, 1.0]]


def test_requests_change_nothing() -> None:
    graph, x = block_graph(has_bias=True)
    expected = relevance(graph, [x]).absolute
    asked = graph.copy()
    for node in [node for node in asked.nodes if query.is_float(node) and node.op == "call_function"]:
        request_quantization(Editor(asked), node, IntegerType(8, signed=True), query.readers(node))
    found = {node.name: each for node, each in relevance(asked, [x]).absolute.items()}
    assert all(torch.equal(found[node.name], each) for node, each in expected.items())


def test_only_what_rules_read_is_kept() -> None:
    """A GELU hands on and reads nothing: what it gets is let go as soon as it was read."""
    from normfuse.sensitivity.relevance_run import find_activations, run_for_rules

    graph, x = block_graph()
    run = run_for_rules(graph, [x], find_activations(graph), RULES)
    kept = {node.target for node in run.values if node.op == "call_function"}
    assert kept == {ops.LINEAR, ops.GELU, ops.ADD, ops.MEAN, ops.ATTENTION, ops.LAYER_NORM}
    assert not any(query.is_call(query.only_reader(node), ops.GELU, ops.LAYER_NORM) for node in run.values)


def test_a_fixed_batch_is_one_sample() -> None:
    x = torch.randn(2, 3, 17, generator=seeded(3), dtype=torch.float64)
    fixed = captured(lambda m, x: m.a(x.reshape(2, 51)), x, a=randomized(nn.Linear(51, 3)).double())
    assert not fixed.has_dynamic_batch
    found = relevance(fixed, [x])
    assert found.conserved.shape == (1,)
    assert all(each.shape == (1,) for each in found.absolute.values())


def test_outputs_that_are_not_finite_are_refused() -> None:
    graph, x = block_graph()
    with pytest.raises(BadInput, match="not finite"):
        relevance(graph, [x / 0])


def test_dead_ends_have_no_relevance() -> None:
    x = wide([1.0, 2.0], [3.0, 4.0])
    parts = {"a": matrix([1.0, 1.0], [2.0, 1.0]), "b": matrix([1.0, 1.0], [2.0, 1.0])}
    graph = captured(lambda m, x: (m.a(x), m.b(x)), x, **parts)
    found = relevance(graph, [x], keep=graph.outputs)
    first, second = graph.outputs
    assert found.absolute[first].tolist() == [1.0, 1.0]
    assert found.absolute[second].tolist() == [0.0, 0.0]
    assert found.kept[second].tolist() == [[0.0, 0.0], [0.0, 0.0]]
    assert found.conserved.tolist() == [1.0, 1.0]


ZOO = ["glyphs_vit_ln", "glyphs_vit_un", "glyphs_vit_prepbn", "glyphs_resnet_bn", "scenes_segmenter_ln"]


@pytest.mark.slow
@pytest.mark.parametrize("name", [*ZOO, "digits_vit_ln", "glyphs_swin_prepbn"])
def test_zoo(name: str) -> None:
    """Every linear map of every network takes part; a batch gets what each sample would; little is lost."""
    graph = converted(folded(name), torch.float64)
    images = make(MODELS[name].task, "test", 3, 0)[0].double()
    found = relevance(graph, [images])
    maps = [node for node in graph.nodes if query.is_call(node, *LINEAR_MAPS)]
    assert all(bool((found.absolute[node] > 0).all()) for node in maps)
    assert all(bool(each.isfinite().all()) for each in found.absolute.values())
    assert found.defaulted == ()
    assert bool(((found.conserved - 1).abs() < 0.05).all())
    assert_same(relevance(graph, [images[1:2]]), found, at=1)


def assert_same(alone: Relevance, together: Relevance, *, at: int) -> None:
    names: dict[fx.Node, Tensor] = {node: each[at : at + 1] for node, each in together.absolute.items()}
    for node, each in alone.absolute.items():  # sums in another order, divided by what cancels: some digits go
        torch.testing.assert_close(names[node], each, rtol=1e-6, atol=1e-9)
