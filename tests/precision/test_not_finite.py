"""Infinity in a mask is nothing wrong; NaN is, and is named by layer and sample."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from normfuse.errors import BadInput
from normfuse.export.placement import onnx_placement
from normfuse.graph import Graph, capture
from normfuse.passes.place_quantizers import PlaceQuantizers
from normfuse.precision import Quantization, chunked, refine_blockwise, refinements, round_all_to_nearest
from normfuse.precision.block import relative_error
from normfuse.quant.bits import Bits
from normfuse.quant.levers import Effort, Levers
from normfuse.testing import Small, observed_ranges, randomized, seeded

WIDTH, LENGTH = 8, 6


def masked(m: Any, x: Tensor) -> Tensor:
    """Two layers of causal attention that share one mask, -inf above the diagonal, made in the graph."""
    mask = torch.full((LENGTH, LENGTH), float("-inf")).triu(1)
    for query, out in ((m.query1, m.out1), (m.query2, m.out2)):
        scores = query(x) @ x.mT + mask
        x = x + out(scores.softmax(-1) @ x)
    result: Tensor = m.head(x)
    return result


def logged(m: Any, x: Tensor) -> Tensor:
    x = x + m.fc1(x).tanh()
    x = x + m.fc2(torch.log(x + 3.0))
    result: Tensor = m.head(x)
    return result


def network(forward: Any, *names: str) -> nn.Module:
    return randomized(Small(forward, **{name: nn.Linear(WIDTH, WIDTH) for name in names}))


def tokens(count: int, seed: int) -> Tensor:
    return torch.randn(count, LENGTH, WIDTH, generator=seeded(seed)) / 4


def decided(model: nn.Module, bits: str) -> tuple[Graph, Quantization]:
    graph, precision = capture(model, (tokens(2, 0),)), Bits.parse(bits)
    PlaceQuantizers(placement=onnx_placement("avx512_vnni", precision)).run(graph)
    ranges = {} if precision.is_weight_only else observed_ranges(graph, tokens(32, 1))
    return graph, round_all_to_nearest(graph, ranges)


@pytest.mark.parametrize("bits", ["w3a8", "w3a16"])
def test_a_mask_that_crosses_blocks_hides_no_error(bits: str) -> None:
    graph, start = decided(network(masked, "query1", "out1", "query2", "out2", "head"), bits)
    chunks = chunked(([x[None]] for x in tokens(64, 1)), 16)
    _, reports = refine_blockwise(
        graph, chunks, start, refinements(Levers.of(Effort.CLOSED_FORM, Bits.parse(bits)), seed=0)
    )
    assert any(len(report.exits) > 1 for report in reports)  # the mask beside the stream
    assert all(0 < report.before < 1 for report in reports)
    assert any(report.kept for report in reports)


def test_equal_infinities_are_no_error_and_others_are_one() -> None:
    inf = float("inf")
    wanted = torch.tensor([3.0, -inf, inf, 4.0])
    found = torch.tensor([3.0, -inf, inf, 5.0], requires_grad=True)
    error = relative_error(found, wanted)
    assert float(error.detach()) == pytest.approx(1 / 25)
    error.backward()  # type: ignore[no-untyped-call]
    assert found.grad is not None
    assert found.grad.tolist() == pytest.approx([0.0, 0.0, 0.0, 2 / 25])
    for other in (0.0, inf):
        assert relative_error(torch.tensor([3.0, other, inf, 4.0]), wanted) == inf
    assert relative_error(torch.tensor([3.0, float("nan"), inf, 4.0]), wanted).isnan()


@pytest.mark.parametrize("count", [32, 5])
@pytest.mark.parametrize(
    ("value", "layers"), [(-3.5, ("at        log", "at        fc2")), (float("nan"), ("at        fc1",))]
)
def test_nan_is_named_by_layer_and_sample(value: float, layers: tuple[str, ...], count: int) -> None:
    graph, start = decided(network(logged, "fc1", "fc2", "head"), "w4a16")
    samples = tokens(count, 3)
    bad = count - 2
    samples[bad, 4, 1] = 20 * value
    chunks = chunked(([x[None]] for x in samples), 16)
    tried = refinements(Levers.of(Effort.CLOSED_FORM, Bits.parse("w4a16")), seed=0)
    with pytest.raises(BadInput) as caught:
        refine_blockwise(graph, chunks, start, tried)
    assert str(caught.value).count(f"calibration sample {bad}") == 1
    assert any(layer in str(caught.value) for layer in layers)  # what makes it, or the first map that reads it


def test_infinity_is_named_by_learning_alone_too() -> None:
    """Weights alone are codes: no range is observed, and of the refinements only learning reads the samples."""
    graph, start = decided(network(logged, "fc1", "fc2", "head"), "w4a16")
    samples = tokens(32, 3)
    samples[5, 4, 1] = float("inf")
    tried = refinements(Levers(reconstruction=True), seed=0)
    with pytest.raises(BadInput, match="calibration sample 5") as caught:
        refine_blockwise(graph, chunked(([x[None]] for x in samples), 16), start, tried)
    assert "fc1" in str(caught.value)


def test_samples_keep_their_numbers_where_shapes_differ() -> None:
    numbers = list[list[int]]()
    samples = [torch.full((1, 2 + number % 2), float(number)) for number in range(7)]
    chunks = chunked(([x] for x in samples), 2, numbers=numbers)
    assert sorted(number for each in numbers for number in each) == list(range(7))
    assert [chunk[0][:, 0].tolist() for chunk in chunks] == [list(map(float, each)) for each in numbers]
