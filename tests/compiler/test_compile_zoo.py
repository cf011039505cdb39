"""Trained models and real shapes, from the file to the written engine: checks, operators, size, accuracy."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

import normfuse
from benchmarks.deit import NORMS, deit_small, images
from examples.zoo.data import make
from examples.zoo.models import MODELS
from examples.zoo.train import WEIGHTS
from normfuse.artifact import verify_artifact
from normfuse.build import write_float
from normfuse.data import Samples
from normfuse.data.samples import Sample
from normfuse.recipe import Recipe
from normfuse.testing import Small, randomized

NAMES = sorted(path.stem for path in WEIGHTS.glob("*.pt2"))
# Accuracy is judged where it is measured on enough images; elsewhere the quantized engine itself is looked at.
UNJUDGED = Recipe(benchmark=False, threads=1, max_drop=100.0)
WITH_A_CONSTANT = {"Mul", "Div", "Sub", "Add"}


def samples(arrays: np.ndarray[tuple[int, ...], np.dtype[np.float32]], labels: torch.Tensor | None = None) -> Samples:
    return Samples(
        source="test",
        names=("image",),
        count=len(arrays),
        labels=None if labels is None else labels.numpy(),
        read=lambda: (Sample({"image": row}, f"sample {index}") for index, row in enumerate(arrays)),
    )


def of_the_zoo(name: str, split: str, count: int) -> Samples:
    rows, labels = make(MODELS[name].task, split, count, 0)
    return samples(rows.numpy(), labels)


def constants(model: onnx.ModelProto) -> dict[str, tuple[int, ...]]:
    """Return the shapes of all constants by name, and of what is computed of constants alone (codes become floats)."""
    found = {value.name: numpy_helper.to_array(value).shape for value in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type in ("DequantizeLinear", "Cast", "Mul") and set(node.input) <= found.keys():
            found[node.output[0]] = found[node.input[0]]
    return found


def frozen_norms(path: Path) -> list[str]:
    """Return what is left of frozen norms: arithmetic with one number per channel that is no linear map's bias."""
    model = onnx.load(path)
    shapes = constants(model)
    products = {node.output[0] for node in model.graph.node if node.op_type == "MatMul"}
    found = []
    for node in model.graph.node:
        per_channel = [name for name in node.input if sum(size > 1 for size in shapes.get(name, ())) == 1]
        is_bias = node.op_type == "Add" and not products.isdisjoint(node.input)
        if set(node.input) <= shapes.keys():  # computed when the file is loaded
            continue
        if node.op_type == "BatchNormalization" or (node.op_type in WITH_A_CONSTANT and per_channel and not is_bias):
            found.append(f"{node.name} ({node.op_type})")
    return found


def float_weights(path: Path) -> list[str]:
    """Return the linear maps whose weight is float."""
    model = onnx.load(path)
    dequantized = {node.output[0] for node in model.graph.node if node.op_type == "DequantizeLinear"}
    return [
        node.name for node in model.graph.node if node.op_type in ("Gemm", "Conv") and node.input[1] not in dequantized
    ]


def operators(path: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(path).graph.node)


def check_engine(built: normfuse.compiler.Built, *, layer_norms: int) -> None:
    """The checks ran and hold, the quantized engine ships, and nothing in it is float that need not be."""
    checks = built.report["checks"]
    assert len(checks) >= 4
    assert all(check["holds"] for check in checks), checks
    assert built.report["verdict"]["ships"] == "int8"
    refused = [refusal for step in built.report["passes"] for refusal in step["refused"]]
    assert len(float_weights(built.engine.path)) == sum(refusal["reason"] == "too_small" for refusal in refused)
    assert operators(built.engine.path)["LayerNormalization"] == layer_norms


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_trained_model_is_folded_and_quantized(name: str, tmp_path: Path) -> None:
    path = WEIGHTS / f"{name}.pt2"
    graph = normfuse.capture(torch.export.load(path))
    layer_norms = sum("layer_norm" in str(node.target) for node in graph.nodes)
    write_float(graph, tmp_path / "float.onnx")
    built = normfuse.compile(path, calibration=of_the_zoo(name, "calib", 32), recipe=UNJUDGED)
    check_engine(built, layer_norms=layer_norms)
    # Behind the sums a norm stands on the residual stream itself, which has other readers than one linear map.
    if not name.endswith("_post"):
        assert frozen_norms(tmp_path / "float.onnx") == []
        assert frozen_norms(built.engine.path) == []


@pytest.mark.slow
def test_unified_norms_keep_their_accuracy_at_three_tenths_of_the_size(tmp_path: Path) -> None:
    name = "glyphs_vit_un"
    built = normfuse.compile(
        WEIGHTS / f"{name}.pt2",
        calibration=of_the_zoo(name, "calib", 128),
        evaluation=of_the_zoo(name, "test", 4000),
        recipe=Recipe(benchmark=False, threads=1),
    )
    assert built.holds
    assert built.report["verdict"]["verdict"] == "kept"
    floating, quantized = built.report["comparison"]["rows"]
    assert (floating["label"], quantized["label"]) == ("float", "int8")
    assert floating["samples"] == quantized["samples"] == 4000
    assert quantized["top_1"] >= floating["top_1"] - 0.5

    built.save(tmp_path / "out")
    assert verify_artifact(tmp_path / "out") == []
    assert (tmp_path / "out" / "model.onnx").stat().st_size == quantized["file_bytes"]
    assert quantized["file_bytes"] <= 0.30 * floating["file_bytes"]


@pytest.mark.slow
def test_a_segmenter_is_judged_by_its_mean_iou() -> None:
    name = "scenes_segmenter_ln"
    built = normfuse.compile(
        WEIGHTS / f"{name}.pt2",
        calibration=of_the_zoo(name, "calib", 128),
        evaluation=of_the_zoo(name, "test", 500),
        recipe=Recipe(benchmark=False, threads=1, max_drop=0.5),
    )
    verdict = built.report["verdict"]
    assert verdict["ships"] == "int8"
    assert any(reason.startswith("mean IoU ") for reason in verdict["reasons"])
    floating, quantized = built.report["comparison"]["rows"]
    assert floating["top_1"] is quantized["top_1"] is None
    assert floating["mean_iou"] > 60
    assert quantized["mean_iou"] >= floating["mean_iou"] - 0.5
    assert quantized["ratios"]["drop"] == pytest.approx(floating["mean_iou"] - quantized["mean_iou"], abs=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("norm", list(NORMS))
def test_two_blocks_of_deit_are_quantized(norm: str) -> None:
    model, sample = deit_small(norm, layers=2), images(2, seed=3)
    built = normfuse.compile(model, [images(2)], calibration=samples(images(4, seed=1).numpy()), recipe=UNJUDGED)
    check_engine(built, layer_norms=5 if norm == "LN" else 0)
    assert frozen_norms(built.engine.path) == []
    assert float_weights(built.engine.path) == []
    found = operators(built.engine.path)
    assert (found["Gemm"], found["Conv"]) == (13, 1), (
        "q, k, v, output, up and down of each block, the head; the patches"
    )
    difference = built.session(threads=1)(image=sample.numpy())["output"] - model(sample).detach().numpy()
    noise = np.square(difference).sum() / np.square(model(sample).detach().numpy()).sum()
    assert noise < 10 ** (-20 / 10), "a hundredth: 8 bits of 256 steps leave far less on every single tensor"


@pytest.mark.slow
def test_a_frozen_norm_that_is_left_would_be_found(tmp_path: Path) -> None:
    norm = randomized(nn.BatchNorm1d(5))
    graph = normfuse.capture(Small(lambda self, x: self.norm(x) + x, norm=norm), torch.randn(2, 5))
    write_float(graph, tmp_path / "float.onnx")
    assert frozen_norms(tmp_path / "float.onnx") != []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["glyphs_vit_ln", "glyphs_vit_un"])
def test_one_image_calibrates_eight_bits(name: str) -> None:
    built = normfuse.compile(
        WEIGHTS / f"{name}.pt2",
        calibration=of_the_zoo(name, "calib", 1),
        evaluation=of_the_zoo(name, "test", 2000),
        recipe=Recipe(benchmark=False, threads=1, max_drop=0.7),
    )
    assert built.report["accuracy_control"]["put_back"] == []
    assert built.holds
