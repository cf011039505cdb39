"""What graphs are fed: real samples in whole batches, random ones of real sizes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from normfuse.data import Samples
from normfuse.data.samples import Sample
from normfuse.errors import BadInput, UnsupportedModel
from normfuse.feeding import bind, fixed_batch, random_inputs, random_samples, stream
from normfuse.graph import Graph, capture


class Sequence(nn.Module):
    def forward(self, ids: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        return torch.where(ids > 0, weight, -weight) * scale


def with_free_length() -> Graph:
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length")
    axes = {0: batch, 1: length}
    examples = (torch.ones(2, 7, dtype=torch.int32), torch.ones(2, 7), torch.tensor(3.0))
    program = torch.export.export(Sequence(), examples, dynamic_shapes={"ids": axes, "weight": axes, "scale": {}})
    return capture(program)


class OfFour(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.arange(4.0)[:, None]


def of_four() -> Graph:
    return capture(OfFour(), [torch.zeros(4, 3)])


def rows(count: int) -> Samples:
    return Samples(
        source="rows",
        names=("x",),
        count=count,
        read=lambda: (Sample({"x": np.full(3, float(index))}, f"row {index}") for index in range(count)),
    )


def test_random_samples_have_the_sizes_of_the_example_and_fit_the_graph() -> None:
    graph = with_free_length()
    found = list(stream(bind(random_samples(graph, seed=1), graph), graph)())
    assert len(found) == 4
    assert [(value.dtype, tuple(value.shape)) for value in found[0]] == [
        (torch.int32, (1, 7)),
        (torch.float32, (1, 7)),
        (torch.float32, ()),
    ]
    for batch in found:
        graph.run(*batch)


def test_the_seed_decides_random_samples() -> None:
    graph = of_four()
    first, again, other = (next(iter(random_samples(graph, seed=seed))).inputs["x"] for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize("graph", [with_free_length(), of_four()], ids=["any batch", "a fixed batch"])
def test_random_inputs_are_random_samples_without_numpy(graph: Graph) -> None:
    found = random_inputs(graph, count=3, seed=1)
    expected = list(stream(bind(random_samples(graph, seed=1), graph), graph)())[:3]
    for ours, theirs in zip(found, expected, strict=True):
        assert all(map(torch.equal, ours, theirs))
        assert [value.dtype for value in ours] == [value.dtype for value in theirs]


def test_random_inputs_of_a_type_that_numpy_lacks() -> None:
    graph = capture(nn.ReLU(), [torch.zeros(2, 3, dtype=torch.bfloat16)])
    ((value,),) = random_inputs(graph, count=1, seed=0)
    assert (value.dtype, value.shape) == (torch.bfloat16, (1, 3))


def test_a_type_that_numpy_lacks_is_unsupported() -> None:
    graph = capture(nn.ReLU(), [torch.zeros(2, 3, dtype=torch.bfloat16)])
    with pytest.raises(UnsupportedModel, match="bfloat16"):
        bind(random_samples(graph, seed=0), graph)


def test_a_fixed_batch_is_fed_whole_batches() -> None:
    graph = of_four()
    assert fixed_batch(graph) == 4
    assert fixed_batch(with_free_length()) is None
    found = list(stream(bind(rows(9), graph), graph)())
    assert [batch[0][:, 0].tolist() for batch in found] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert len(random_samples(graph, seed=0)) == 16


def test_too_few_samples_for_one_batch_are_refused() -> None:
    graph = of_four()
    with pytest.raises(BadInput, match="takes batches of 4, there are 3 samples"):
        bind(rows(3), graph)
    with pytest.raises(BadInput, match="takes batches of 4, there are 2 samples"):
        stream(bind(rows(8), graph), graph, limit=2)
