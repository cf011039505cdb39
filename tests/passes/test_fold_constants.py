"""What depends on constants only is computed once; nothing grows, nothing random is frozen."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from normfuse.graph import Graph, capture
from normfuse.passes.fold_constants import FoldConstants
from normfuse.testing import Golden, Small, check_pass_contract, distance, picture, sample, seeded


def standardized(m: Any, x: Tensor) -> Tensor:
    """Weight standardization: the weight is a function of constants."""
    weight = (m.weight - m.weight.mean(1, keepdim=True)) / torch.sqrt(m.weight.var(1, keepdim=True) + 1e-5)
    positions = torch.arange(3, dtype=torch.float64) * 2
    return nn.functional.linear(x, weight * m.gain.view(-1, 1)) + positions


def captured(function: Any, *shape: int, **parts: Tensor) -> Graph:
    return capture(Small(function, **parts), (sample(*shape),))


def test_picture(golden: Golden) -> None:
    graph = captured(standardized, 4, 5, weight=sample(3, 5), gain=sample(3))
    before = graph.text()
    FoldConstants().run(graph)
    assert picture(before, graph.text()) == golden


def test_numbers_and_contract() -> None:
    x, parts = sample(4, 5), {"weight": sample(3, 5), "gain": sample(3)}
    graph = captured(standardized, 4, 5, **parts)
    assert check_pass_contract(FoldConstants(), graph, (x,)).changed
    FoldConstants().run(graph)
    assert distance(graph.run(x), [standardized(Small(standardized, **parts), x)]) == 0


def test_the_order_of_the_model_is_kept_bit_for_bit() -> None:
    function = lambda m, x: x * (m.w / torch.sqrt(m.v + 1e-5))  # noqa: E731
    x, w, v = torch.randn(4, 5, generator=seeded(0)), torch.randn(5, generator=seeded(1)), torch.rand(5) + 0.1
    graph = capture(Small(function, w=w, v=v), (x,))
    FoldConstants().run(graph)
    assert torch.equal(graph.run(x)[0], x * (w / torch.sqrt(v + 1e-5)))


def test_a_constant_that_would_grow_stays() -> None:
    graph = captured(lambda m, x: x + m.w.expand(90, 60), 90, 60, w=sample(60))
    assert not FoldConstants().run(graph).changed
    assert FoldConstants(largest_growth=90).run(graph).applied == {"compute-constant": 1}


def test_dropout_of_a_constant_is_the_constant() -> None:
    graph = captured(lambda m, x: x + torch.dropout(m.w, 0.5, False) * 2, 4, 3, w=sample(3))
    assert FoldConstants().run(graph).applied == {"compute-constant": 2}


def test_what_has_no_single_tensor_as_its_value_stays() -> None:
    graph = captured(lambda m, x: x + m.w.chunk(2)[1], 4, 3, w=sample(6))
    assert not FoldConstants().run(graph).changed


def test_sizes_of_the_batch_are_not_frozen() -> None:
    graph = captured(lambda m, x: x + torch.arange(x.shape[0], dtype=x.dtype).unsqueeze(1), 4, 3)
    FoldConstants().run(graph)
    assert graph.has_dynamic_batch
    x = sample(6, 3)
    assert distance(graph.run(x), [x + torch.arange(6).unsqueeze(1)]) == 0


def test_a_view_of_a_constant_is_a_constant_of_its_own() -> None:
    graph = captured(lambda m, x: x * m.w[1] + m.w.t()[:, 0], 4, 3, w=sample(2, 3))
    FoldConstants().run(graph)
    addresses = [tensor.untyped_storage().data_ptr() for tensor in graph.module.buffers()]
    assert len(set(addresses)) == 2
    assert all(tensor.is_contiguous() for tensor in graph.module.buffers())


def test_weights_are_not_computed_away() -> None:
    graph = capture(nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 2)), (torch.ones(2, 5),))
    before = graph.text()
    assert not FoldConstants().run(graph).changed
    assert graph.text() == before


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float16])
def test_constants_keep_their_type(dtype: torch.dtype) -> None:
    w = torch.tensor([3, 0, 1]).to(dtype)
    graph = captured(lambda m, x: x.masked_fill(m.w.flip(0).bool(), 0.0) + m.w.flip(0), 4, 3, w=w)
    FoldConstants().run(graph)
    x = sample(4, 3)
    assert distance(graph.run(x), [x.masked_fill(w.flip(0).bool(), 0.0) + w.flip(0)]) == 0
