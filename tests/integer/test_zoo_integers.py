"""Whole models of the zoo: one file, the reference's bits in any batch on any number of threads, no float inside."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import onnx
import pytest
import torch
from onnx import TensorProto
from torch import Tensor

from examples.zoo.data import make
from examples.zoo.models import MODELS
from examples.zoo.train import WEIGHTS
from normfuse.build import FOLDING, Engine
from normfuse.capturing import capture_model
from normfuse.export.float_tensors import float_tensors
from normfuse.export.onnx import export_onnx
from normfuse.integer_engine import build_integers
from normfuse.loading import load_model
from normfuse.progress import Silent
from normfuse.recipe import Recipe
from normfuse.runtime.onnx_session import open_onnx

NAMES = [
    *("glyphs_vit_ln", "glyphs_vit_un", "glyphs_vit_prepbn"),
    *("glyphs_resnet_bn", "glyphs_swin_prepbn", "scenes_segmenter_ln"),
]
CALIBRATION, COMPARED = 8, 64

LARGEST_SHARE = {
    **dict.fromkeys(("glyphs_vit_ln", "glyphs_vit_un", "glyphs_vit_prepbn", "glyphs_resnet_bn"), 0.27),
    # Beside the quarter that 8-bit weights are, small models hold biases, multipliers and the functions' bodies.
    "glyphs_swin_prepbn": 0.30,
    "scenes_segmenter_ln": 0.45,
}

LIKE_FLOAT = 0.95
"""Images, or pixels, that integers and floats answer alike: eight samples calibrate roughly."""


@dataclass(frozen=True, slots=True)
class Built:
    """One model in both forms."""

    name: str
    engine: Engine
    floating: Path

    @property
    def path(self) -> Path:
        return self.engine.path


@pytest.fixture(scope="module", params=NAMES)
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Built:
    name, folder = str(request.param), tmp_path_factory.mktemp("zoo")
    graph = capture_model(load_model(WEIGHTS / f"{name}.pt2"))
    FOLDING.run(graph)
    export_onnx(graph, folder / "float.onnx")
    samples, _ = make(MODELS[name].task, "calib", CALIBRATION, 0)
    engine = build_integers(
        graph,
        lambda: ([each[None]] for each in samples),
        folder / "integers.onnx",
        recipe=Recipe(integer_only=True),
        total=CALIBRATION,
        threads=1,
        progress=Silent(),
    )
    return Built(name, engine, folder / "float.onnx")


def run(path: Path, images: Tensor, *, batch: int, threads: int) -> Tensor:
    session = open_onnx(path, threads=threads)
    parts = [list(session.run({"image": some.numpy()}).values()) for some in torch.split(images, batch)]
    return torch.cat([torch.from_numpy(found) for (found,) in parts])


@pytest.mark.slow
def test_onnxruntime_has_the_bits_of_the_reference(built: Built) -> None:
    images, _ = make(MODELS[built.name].task, "test", COMPARED, 0)
    (wanted,) = built.engine.graph.run(images)
    for threads in (1, 2):
        for batch in (1, 3, COMPARED):
            found = run(built.path, images, batch=batch, threads=threads)
            assert torch.equal(found, wanted), f"{(found != wanted).sum()} values, batch {batch}, {threads} threads"
    floats = run(built.floating, images, batch=COMPARED, threads=1)
    assert (wanted.argmax(1) == floats.argmax(1)).double().mean() >= LIKE_FLOAT


@pytest.mark.slow
def test_the_file_is_checked_small_and_without_floats(built: Built) -> None:
    assert float_tensors(built.path) == []
    assert len(float_tensors(built.floating)) > 50, "the audit finds floats where there are some"
    onnx.checker.check_model(str(built.path), full_check=True)
    share = built.path.stat().st_size / built.floating.stat().st_size
    assert share < LARGEST_SHARE[built.name]
    assert not built.path.with_name(f"{built.path.name}.data").exists()


@pytest.mark.slow
def test_only_scales_of_the_ends_are_float_constants(built: Built) -> None:
    graph = onnx.load(built.path).graph
    kinds = {TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.FLOAT16}
    floats = [tensor for tensor in graph.initializer if tensor.data_type in kinds]
    assert len(floats) == len(graph.input) + len(graph.output)
    assert all(list(tensor.dims) == [] for tensor in floats)


@pytest.mark.slow
def test_nothing_float_is_left_in_the_graph(built: Built) -> None:
    allowed = {"normfuse.quantize.default", "normfuse.dequantize.default"}
    for node in built.engine.graph.nodes:
        if node.op == "call_function" and str(node.target) not in allowed:
            value = node.meta["val"]
            assert not (isinstance(value, Tensor) and value.is_floating_point()), f"{node.name} calls {node.target}"
