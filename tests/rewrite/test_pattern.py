"""Patterns bind what they name, in either order where they commute, and leave no trace of a failed try."""

from typing import Any

import torch
from torch import fx

from normfuse.graph import Graph, capture, ops, query
from normfuse.rewrite import anything, call, constant
from normfuse.testing import Small


def captured(function: Any) -> tuple[Graph, fx.Node]:
    graph = capture(Small(function, c=torch.ones(5), d=torch.ones(5)), torch.ones(3, 5))
    return graph, [node for node in graph.nodes if node.op == "call_function"][-1]


def test_a_call_binds_its_parts() -> None:
    _, root = captured(lambda m, x: x.relu() * m.c)
    match = call(ops.MUL, args=(call(ops.RELU, as_="relu"), constant("c"))).match(root)
    assert match is not None
    assert match.root is root
    assert query.is_call(match["relu"], ops.RELU)
    assert match["c"].target == "c"


def test_other_operators_and_other_operands_do_not_match() -> None:
    _, root = captured(lambda m, x: x.relu() * m.c)
    assert call(ops.ADD).match(root) is None
    assert call(ops.MUL, args=(constant("c"), anything("x"))).match(root) is None
    assert call(ops.MUL, args=(anything("a"), anything("b"), anything("c"))).match(root) is None
    assert call(ops.MUL).match(3.0) is None


def test_commuting_operands_match_in_both_orders() -> None:
    for function in (lambda m, x: m.c * x.relu(), lambda m, x: x.relu() * m.c):
        _, root = captured(function)
        match = call(ops.MUL, args=(call(ops.RELU, as_="relu"), constant("c")), commutes=True).match(root)
        assert match is not None
        assert query.is_constant(match["c"])


def test_one_name_is_one_node() -> None:
    pattern = call(ops.MUL, args=(call(ops.RELU, args=(anything("x"),)), call(ops.GELU, args=(anything("x"),))))
    _, same = captured(lambda m, x: x.relu() * torch.nn.functional.gelu(x))
    _, other = captured(lambda m, x: x.relu() * torch.nn.functional.gelu(x + 1))
    assert pattern.match(same) is not None
    assert pattern.match(other) is None


def test_a_failed_order_leaves_no_binding() -> None:
    _, root = captured(lambda m, x: m.c * (x.relu() + m.d))
    inner = call(ops.ADD, args=(call(ops.RELU, as_="first"), constant("d")))
    match = call(ops.MUL, args=(inner, anything("first_c")), commutes=True).match(root)
    assert match is not None
    assert set(match.bound) == {"first", "d", "first_c"}


def test_scalars_are_anything_but_no_constant() -> None:
    _, root = captured(lambda m, x: x * 2.0)
    assert call(ops.MUL, args=(anything("x"), anything("two"))).match(root) is not None
    assert call(ops.MUL, args=(anything("x"), constant("two"))).match(root) is None
