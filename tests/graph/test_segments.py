"""A network cut in segments computes what it computes whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from normfuse.graph import Graph, capture, ops, query
from normfuse.graph.segments import run_segment, segments
from normfuse.testing import Small, randomized, seeded


def is_linear(node: Any) -> bool:
    return query.is_call(node, ops.LINEAR)


def residual(m: Any, x: Tensor) -> Tensor:
    x = m.a(x)
    for first, second in ((m.b, m.c), (m.d, m.e)):
        x = x + second(first(x).relu())
    result: Tensor = m.f(x)
    return result


def split(m: Any, x: Tensor) -> Tensor:
    a, b = m.a(x).chunk(2, -1)
    y = m.b(a) * x.shape[0] + m.c(b)
    result: Tensor = m.d(torch.cat([y, b], -1).reshape(x.shape[0], -1))
    return result


def masked(m: Any, x: Tensor) -> Tensor:
    mask = (x[..., :1] > 0).float()  # no weight has touched it: it may pass beside
    y = m.b(m.a(x).relu() * mask) * mask
    result: Tensor = m.c(y + mask)
    return result


CASES = [
    pytest.param(residual, dict.fromkeys("abcdef"), 4, id="residual"),
    pytest.param(split, {"a": (5, 6), "b": (3, 4), "c": (3, 4), "d": (21, 2)}, 3, id="split"),
    pytest.param(masked, dict.fromkeys("abc"), 3, id="mask"),
]


def captured(function: Any, parts: dict[str, tuple[int, int] | None]) -> tuple[nn.Module, Graph, Tensor]:
    layers = {name: nn.Linear(*(sizes or (5, 5))) for name, sizes in parts.items()}
    model, x = randomized(Small(function, **layers)), torch.randn(4, 3, 5, generator=seeded(1))
    return model, capture(model, (x,)), x


@pytest.mark.parametrize(("function", "parts", "count"), CASES)
def test_the_parts_are_the_whole(function: Any, parts: Any, count: int) -> None:
    model, graph, x = captured(function, parts)
    found = segments(graph, wanted=is_linear)
    assert len(found) == count
    assert [node for part in found for node in part.nodes] == [
        node for node in graph.nodes if node.op == "call_function"
    ]
    assert all(any(is_linear(node) for node in part.nodes) for part in found)
    for batch in (4, 7):
        x = torch.randn(batch, 3, 5, generator=seeded(batch))
        values: dict[Any, Any] = {graph.inputs[0]: x}
        for part in found:
            assert all(entry in values for entry in part.entries)
            run_segment(graph, part, values, lambda node, args, kwargs: node.target(*args, **kwargs))
        assert torch.equal(values[graph.outputs[0]], model(x))


@pytest.mark.parametrize(("function", "parts", "count"), CASES)
def test_one_tensor_of_weights_passes(function: Any, parts: Any, count: int) -> None:
    _, graph, _ = captured(function, parts)
    *inner, _ = segments(graph, wanted=is_linear)
    touched = {node for part in inner for node in part.nodes if is_linear(node)}
    for part in inner:
        made = [node for node in part.exits if query.is_tensor(node) and _depends_on(node, touched)]
        assert len(made) == 1


def _depends_on(node: Any, sources: set[Any]) -> bool:
    return node in sources or any(_depends_on(source, sources) for source in node.all_input_nodes)


def test_what_reads_an_earlier_block_joins_them() -> None:
    def dense(m: Any, x: Tensor) -> Tensor:
        y = m.a(x)
        result: Tensor = m.c(m.b(y).relu()) + y
        return result

    _, graph, _ = captured(dense, dict.fromkeys("abc"))
    assert len(segments(graph, wanted=is_linear)) == 2
