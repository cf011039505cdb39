"""The error at the readers' outputs: exact where it is asked for or cheap, else a sketch that keeps every column."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from normfuse.graph import Graph, capture, query
from normfuse.output_error import SKETCHED, OutputError
from normfuse.testing import Small, seeded

WIDE = 5 * SKETCHED


def joint(m: Any, x: Tensor) -> Any:
    return m.one(x), m.other(x), x.tanh()


def wide() -> tuple[nn.Module, Graph]:
    torch.manual_seed(0)
    model = Small(joint, one=nn.Linear(40, WIDE), other=nn.Linear(40, WIDE + 7))
    return model, capture(model.eval(), [torch.randn(2, 9, 40)])


def exact_error(model: Any, difference: Tensor) -> float:
    outputs = [difference @ model.one.weight.mT, difference @ model.other.weight.mT, difference]
    return sum(float(each.detach().double().square().sum()) for each in outputs)


def error_of(graph: Graph, *, is_exact: bool) -> OutputError:
    return OutputError(graph, query.readers(graph.inputs[0]), is_exact=is_exact)


def test_exact_is_exact() -> None:
    model, graph = wide()
    difference = torch.randn(1, 9, 40, generator=seeded(1))
    # Sums of 40 and of thousands of float32 products, in another order.
    assert error_of(graph, is_exact=True)(difference) == pytest.approx(exact_error(model, difference), rel=1e-5)


@pytest.mark.parametrize("channel", [0, 17, 39])
def test_a_sketch_keeps_the_error_of_one_channel(channel: int) -> None:
    model, graph = wide()
    difference = torch.zeros(1, 9, 40)
    difference[..., channel] = torch.randn(9, generator=seeded(2))
    assert error_of(graph, is_exact=False)(difference) == pytest.approx(exact_error(model, difference), rel=1e-5)


def test_a_sketch_is_near_for_independent_errors_and_is_one() -> None:
    model, graph = wide()
    difference = torch.randn(64, 9, 40, generator=seeded(3))
    found, wanted = error_of(graph, is_exact=False)(difference), exact_error(model, difference)
    # Off-diagonals of the Gram matrix are off by its diagonal / sqrt(SKETCHED), and 40^2 random signs add up:
    # sqrt(40^2 / (64 * 9)) / (40 * sqrt(SKETCHED)) of the whole is 0.5 %; four deviations.
    assert found == pytest.approx(wanted, rel=0.02)
    assert found != pytest.approx(wanted, rel=1e-6)
    assert found == error_of(graph, is_exact=False)(difference)


def test_grouped_convolutions_are_never_sketched() -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(WIDE, WIDE, 3, groups=WIDE // 2, padding=1)
    graph = capture(conv.eval(), [torch.randn(2, WIDE, 5, 4)])
    difference = torch.randn(1, WIDE, 5, 4, generator=seeded(4))
    wanted = torch.conv2d(difference, conv.weight.detach(), None, 1, 1, 1, WIDE // 2).double().square().sum()
    assert error_of(graph, is_exact=False)(difference) == pytest.approx(float(wanted), rel=1e-5)
