"""What leaves an integer network: tensors returned twice, class maps, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from normfuse.build import FOLDING
from normfuse.capturing import capture_model
from normfuse.errors import UnsupportedModel
from normfuse.export.float_tensors import float_tensors
from normfuse.graph import Graph
from normfuse.integer_engine import build_integers
from normfuse.progress import Silent
from normfuse.recipe import Recipe
from normfuse.runtime.onnx_session import open_onnx
from normfuse.testing import seeded

X = torch.randn(24, 3, 8, 6, generator=seeded(0))


class Network(nn.Module):
    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.conv, self.function = nn.Conv2d(3, 7, 3, padding=1), function

    def forward(self, image: Tensor) -> Any:
        """Return what the function makes of the scores of pixels."""
        return self.function(self.conv(image))


def built(path: Path, function: Callable[[Tensor], Any]) -> tuple[Graph, dict[str, np.ndarray]]:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = Network(function).eval()
    graph = capture_model(model, X[:2])
    FOLDING.run(graph)
    recipe = Recipe(integer_only=True, effort=0)
    engine = build_integers(
        graph, lambda: ([x[None]] for x in X), path, recipe=recipe, total=len(X), threads=1, progress=Silent()
    )
    found = open_onnx(path, threads=1).run({graph.input_names[0]: X.numpy()})
    for name, wanted in zip(engine.graph.output_names, engine.graph.run(X), strict=True):
        assert np.array_equal(found[name], wanted.numpy())
        assert found[name].dtype == wanted.numpy().dtype
    assert float_tensors(path) == []
    return engine.graph, found


def test_a_tensor_is_returned_twice(tmp_path: Path) -> None:
    graph, found = built(tmp_path / "m.onnx", lambda y: (y, y))
    first, second = (found[name] for name in graph.output_names)
    assert np.array_equal(first, second)


@pytest.mark.parametrize("keepdim", [False, True])
def test_a_class_map_is_that_of_the_scores(keepdim: bool, tmp_path: Path) -> None:
    graph, found = built(tmp_path / "m.onnx", lambda y: (y, y.argmax(1, keepdim=keepdim)))
    scores, classes = (found[name] for name in graph.output_names)
    assert classes.dtype == np.int64
    assert np.array_equal(classes, np.expand_dims(scores.argmax(1), 1) if keepdim else scores.argmax(1))


def test_a_class_map_alone(tmp_path: Path) -> None:
    graph, found = built(tmp_path / "m.onnx", lambda y: y.argmax(1))
    assert found[graph.output_names[0]].shape == (24, 8, 6)
    assert len(np.unique(found[graph.output_names[0]])) > 3


@pytest.mark.parametrize(
    ("function", "named"), [(lambda y: y > 0, "aten.gt"), (lambda y: y.sort(1).indices, "aten.sort")]
)
def test_comparisons_are_refused_by_name(function: Callable[[Tensor], Any], named: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match=named):
        built(tmp_path / "m.onnx", function)
    assert not (tmp_path / "m.onnx").exists()
