"""Weights of fewer bits: the file shrinks, the arithmetic stays the reference's, errors are fed back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from normfuse.build import FOLDING
from normfuse.capturing import capture_model
from normfuse.errors import UsageError
from normfuse.integer_engine import build_integers
from normfuse.progress import Silent
from normfuse.recipe import Recipe
from normfuse.runtime.onnx_session import open_onnx
from normfuse.testing import seeded

X = torch.randn(32, 24, generator=seeded(0))


def network() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(24, 96), nn.GELU(), nn.Linear(96, 64), nn.ReLU(), nn.Linear(64, 9)).eval()


def built(path: Path, bits: str, effort: int = 1) -> tuple[torch.Tensor, np.ndarray]:
    """Return what reference and onnxruntime make of the samples."""
    graph = capture_model(network(), X[:2])
    FOLDING.run(graph)
    recipe = Recipe(integer_only=True, bits=bits, effort=effort)
    engine = build_integers(
        graph, lambda: ([x[None]] for x in X), path, recipe=recipe, total=len(X), threads=1, progress=Silent()
    )
    (name,), (output,) = graph.input_names, graph.output_names
    return engine.graph.run(X)[0], open_onnx(path, threads=1).run({name: X.numpy()})[output]


@pytest.mark.parametrize("bits", ["w2a8", "w3a8", "w4a8", "w5a8", "8"])
def test_any_width_is_the_reference(bits: str, tmp_path: Path) -> None:
    reference, found = built(tmp_path / "m.onnx", bits)
    assert np.array_equal(found, reference.numpy())


def test_four_bits_halve_the_weights_in_the_file(tmp_path: Path) -> None:
    sizes = {}
    for bits in ("w4a8", "8"):
        built(tmp_path / f"{bits}.onnx", bits, effort=0)
        held = onnx.load(tmp_path / f"{bits}.onnx").graph.initializer
        kinds = {onnx.TensorProto.INT4, onnx.TensorProto.INT8}
        sizes[bits] = sum(len(each.raw_data) for each in held if each.data_type in kinds and len(each.dims) > 1)
    weights = 24 * 96 + 96 * 64 + 64 * 9
    assert sizes == {"8": weights, "w4a8": weights // 2}


def test_errors_of_few_bits_are_fed_back(tmp_path: Path) -> None:
    exact = network()(X).detach()
    errors = [float((built(tmp_path / "m.onnx", "w3a8", effort)[0] - exact).square().mean()) for effort in (0, 1)]
    assert errors[1] < 0.8 * errors[0]


@pytest.mark.parametrize("bits", ["w4a4", "w8a16", "32", "w16a8"])
def test_other_widths_of_activations_are_refused(bits: str) -> None:
    with pytest.raises(UsageError, match="bits"):
        Recipe(integer_only=True, bits=bits)
