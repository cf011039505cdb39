"""Samples of one shape share a chunk evenly, and enough of them, from all over, judge."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from normfuse.export.placement import X86_VNNI
from normfuse.graph import capture
from normfuse.passes.place_quantizers import PlaceQuantizers
from normfuse.precision import Quantization, chunk_size, chunked, refine_blockwise, samples_in, split
from normfuse.precision.block import Block


def test_chunks_keep_every_sample() -> None:
    found = chunked(((torch.full((1, 2), float(i)), torch.tensor(5)) for i in range(7)), 3)
    assert [len(chunk[0]) for chunk in found] == [2, 2, 3]
    assert torch.cat([chunk[0] for chunk in found])[:, 0].tolist() == list(range(7))
    assert all(int(chunk[1]) == 5 for chunk in found)


@pytest.mark.parametrize(("count", "sizes"), [(16, [16]), (17, [8, 9]), (33, [11, 11, 11]), (128, [16] * 8)])
def test_no_chunk_is_a_leftover(count: int, sizes: list[int]) -> None:
    assert [samples_in(chunk) for chunk in chunked(([torch.zeros(1, 2)] for _ in range(count)), 16)] == sizes


def test_a_chunk_has_samples_of_one_shape() -> None:
    samples = [(torch.full((1, length), float(i)),) for i, length in enumerate([2, 3, 2, 3, 3, 2, 5])]
    found = [chunk for (chunk,) in chunked(samples, 2)]
    assert [list(chunk.shape) for chunk in found] == [[1, 2], [2, 2], [1, 3], [2, 3], [1, 5]]
    assert sorted(chunk[row, 0].item() for chunk in found for row in range(len(chunk))) == list(range(7))


@given(sizes=st.lists(st.integers(1, 16), min_size=1, max_size=60), share=st.sampled_from([4, 8]))
def test_enough_samples_judge_and_others_teach(sizes: list[int], share: int) -> None:
    found = split(sizes, share)
    judging = sum(sizes[at] for at in found.judging)
    if len(sizes) == 1:
        assert found.teaching == found.judging == [0]
        return
    assert sorted(found.teaching + found.judging) == list(range(len(sizes)))
    assert found.teaching
    assert judging * share >= sum(sizes) or len(found.teaching) == 1
    assert (judging - max(sizes[at] for at in found.judging)) * share < sum(sizes), "no more than needed"


def test_those_that_judge_are_from_all_over() -> None:
    assert split([16] * 8, 8).judging == [7]
    assert split([4] * 32, 8).judging == [7, 15, 23, 31]
    assert split([1, 16], 8).judging == [1]
    assert split([16, 1], 8).judging == [1]


def test_a_sample_counts_as_much_in_a_small_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss of chunks is the mean over their samples, not over chunks."""
    monkeypatch.setattr(Block, "loss", lambda _self, chunk, _compute: torch.tensor(float(chunk)))
    graph, errors = capture(nn.Linear(16, 8), (torch.randn(2, 16),)), list[float]()
    PlaceQuantizers(placement=X86_VNNI).run(graph)

    def watch(block: Block, found: Quantization) -> Quantization:
        errors.append(block.error(found, [0, 1]))
        return found

    refine_blockwise(
        graph, [(torch.ones(4, 16),), (torch.ones(1, 16),)], Quantization(activations={}, weights={}), {"": watch}
    )
    assert errors == [pytest.approx(1 / 5)]


def test_a_fixed_batch_is_never_joined() -> None:
    class Scaled(nn.Module):
        def forward(self, x: Tensor, factor: Tensor) -> Tensor:
            return x * factor

    free = capture(nn.Linear(3, 2), (torch.randn(2, 3),))
    scalar = capture(Scaled(), (torch.randn(2, 3), torch.tensor(2.0)))
    assert (chunk_size(free), chunk_size(scalar)) == (16, 1)
