"""Where the samples of a batch stand is read off shapes, or not told at all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from normfuse.graph import capture
from normfuse.sensitivity.relevance_run import find_activations
from normfuse.sensitivity.sample_axes import Samples, tell_samples
from normfuse.testing import Small, seeded

AXES: dict[str, tuple[Callable[[Any, Tensor], Tensor], int | None]] = {
    "kept": (lambda m, x: x.relu().flatten(1), 0),
    "moved": (lambda m, x: x.permute(2, 3, 0, 1), 2),
    "joined-behind": (lambda m, x: x.reshape(-1, 5, 7).relu(), 0),
    "joined-behind-others": (lambda m, x: x.permute(3, 0, 1, 2).reshape(7, -1, 5), 1),
    "parted-again": (lambda m, x: x.reshape(-1, 5, 7).relu().reshape(-1, 3, 35), 0),
    "joined-before": (lambda m, x: x.transpose(0, 1).reshape(-1, 5, 7), None),
    "laid-side-by-side": (lambda m, x: torch.cat([x, x.relu()], 0), None),
    "repeated": (lambda m, x: x.repeat(2, 1, 1, 1), None),
    "parted-wrongly": (lambda m, x: x.reshape(-1, 5, 7).reshape(3, -1, 5, 7), None),
    "mixed": (lambda m, x: x - x.mean(0), None),
}


@pytest.mark.parametrize("name", AXES)
def test_axes(name: str) -> None:
    function, expected = AXES[name]
    graph = capture(Small(function), torch.rand(2, 3, 5, 7))
    found = tell_samples(graph, find_activations(graph), 2)
    assert (None if found is None else found.axes[graph.outputs[0]]) == expected


@pytest.mark.parametrize("name", [name for name, (_, axis) in AXES.items() if axis is not None])
def test_sums_and_extremes_are_those_of_every_sample(name: str) -> None:
    function, _ = AXES[name]
    graph = capture(Small(function), torch.rand(2, 3, 5, 7))
    node = graph.outputs[0]
    found = tell_samples(graph, find_activations(graph), 4)
    assert found is not None
    x = torch.rand(4, 3, 5, 7, generator=seeded(1), dtype=torch.float64)
    (y,) = graph.run(x)
    torch.testing.assert_close(found.sums(node, y), x.flatten(1).sum(1), rtol=1e-14, atol=0)
    least, largest = found.extremes(node, y)
    spread = (y - least) / (largest - least)
    assert float(spread.min()) == 0
    assert float(spread.max()) == 1
    only_third = found.spread(node, y, torch.tensor([0.0, 0.0, 1.0, 0.0]))
    torch.testing.assert_close(found.sums(node, y * only_third)[2], x[2].sum(), rtol=1e-14, atol=0)
    assert int((found.sums(node, y * only_third) > 0).sum()) == 1


def test_one_sample_needs_no_axis() -> None:
    graph = capture(Small(lambda m, x: x - x.mean(0)), torch.rand(2, 3))
    found = tell_samples(graph, find_activations(graph), 1)
    assert found == Samples(1, {})
    assert found.sums(graph.outputs[0], torch.ones(1, 3)).tolist() == [3.0]
