"""What an error at a block's exits counts: the curvature of the outputs' error, by least squares."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from normfuse.export.placement import X86_VNNI
from normfuse.graph import Graph, capture
from normfuse.passes.place_quantizers import PlaceQuantizers
from normfuse.precision import Quantization, refine_blockwise, round_all_to_nearest
from normfuse.precision.block import Block
from normfuse.precision.curvature import FLOOR
from normfuse.quant import IntegerType
from normfuse.testing import Small

WIDTH = 12


def readout(sizes: Tensor) -> nn.Linear:
    """A linear map whose columns are orthogonal and have these lengths."""
    layer = nn.Linear(WIDTH, WIDTH)
    basis, _ = torch.linalg.qr(torch.randn(WIDTH, WIDTH))
    layer.weight.data = basis * sizes
    return layer


def placed(sizes: Tensor) -> Graph:
    torch.manual_seed(0)
    parts = {"first": nn.Linear(WIDTH, WIDTH), "last": readout(sizes)}
    graph = capture(Small(lambda m, x: m.last(m.first(x)), **parts), (torch.randn(2, WIDTH),))
    PlaceQuantizers(placement=replace(X86_VNNI, activation=None, weight=IntegerType(3, signed=True))).run(graph)
    return graph


def weights(graph: Graph, chunks: list[tuple[Tensor, ...]]) -> Tensor:
    """Return the weights of the first block's exit."""
    seen = list[Block]()

    def look(block: Block, decided: Quantization) -> Quantization:
        seen.append(block)
        return decided

    refine_blockwise(graph, chunks, round_all_to_nearest(graph, {}), {"look": look}, curvature=True)
    first, last = seen
    assert last.weights is None
    assert first.weights is not None
    (found,) = first.weights
    return found


def test_the_weights_are_the_diagonal_of_a_quadratic() -> None:
    # || A z - y ||^2 has the second derivatives 2 A^T A, diagonal here, so the quotient is exact up to each chunk's own
    # sum of y^2, which the error is divided by: over 32 rows of twelve it varies by a few percent.
    sizes = torch.linspace(0.2, 3, WIDTH)
    found = weights(placed(sizes), [(torch.randn(32, WIDTH),) for _ in range(4)])
    curvature = sizes.square() / sizes.square().mean()
    torch.testing.assert_close(found, ((curvature + FLOOR) / (1 + FLOOR))[None], rtol=0.05, atol=0)
    assert float(found.mean()) == pytest.approx(1)


def test_axes_of_free_sizes_share_their_weights_wherever_they_stand() -> None:
    torch.manual_seed(0)
    parts = {"first": nn.Linear(WIDTH, WIDTH), "last": readout(torch.linspace(0.2, 3, WIDTH))}
    model = Small(lambda m, x: m.last(m.first(x)), **parts)
    free = {"x": {1: torch.export.Dim("batch")}}
    program = torch.export.export(model, (torch.randn(5, 2, WIDTH),), dynamic_shapes=free)
    graph = capture(program, None)
    PlaceQuantizers(placement=replace(X86_VNNI, activation=None, weight=IntegerType(3, signed=True))).run(graph)
    found = weights(graph, [(torch.randn(5, count, WIDTH),) for count in (16, 16, 9)])
    assert found.shape == (5, 1, WIDTH)


def test_what_nobody_reads_keeps_the_floor() -> None:
    sizes = torch.ones(WIDTH)
    sizes[3] = 0
    found = weights(placed(sizes), [(torch.randn(32, WIDTH),) for _ in range(4)])
    assert float(found[0, 3]) == pytest.approx(FLOOR / (1 + FLOOR))


def test_outputs_that_do_not_depend_on_the_block_count_alike() -> None:
    found = weights(placed(torch.zeros(WIDTH)), [(torch.randn(8, WIDTH),) for _ in range(2)])
    assert torch.equal(found, torch.ones(()))
