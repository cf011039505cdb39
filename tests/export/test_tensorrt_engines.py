"""What normfuse writes with TensorRT's placement keeps every rule, and becomes the kernels that were asked for."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from examples.zoo.data import make
from examples.zoo.train import WEIGHTS
from normfuse.build import FOLDING, write_quantized
from normfuse.capturing import capture_model
from normfuse.export.lint import TENSORRT_RULES, lint
from normfuse.export.placement import TENSORRT as PLACEMENT
from normfuse.graph.quantization import requested_weights
from normfuse.loading import load_model
from normfuse.planning import Plan, plan_quantization
from normfuse.progress import Silent
from normfuse.recipe import Recipe
from normfuse.runtime.engine_layers import EngineLayer, read_layers
from normfuse.runtime.tensorrt_build import TENSORRT_RTX, BuildOptions, build_engine

SAMPLES = 8
MODELS = {"glyphs_vit_un": 0, "glyphs_vit_ln": 11, "glyphs_swin_prepbn": 0, "glyphs_resnet_bn": 0}
"""With the number of norms that take statistics of the current input."""

PRODUCTS = ("gemm", "correlation")
"""What TensorRT-RTX calls products and convolutions."""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("tensorrt_rtx") is None,
        reason="tensorrt-rtx is not installed: pip install '.[trt-rtx]'",
    ),
]


def planned(name: str) -> Plan:
    graph = capture_model(load_model(WEIGHTS / f"{name}.pt2"))
    FOLDING.run(graph)
    images, _ = make("glyphs", "calib", SAMPLES, 0)
    return plan_quantization(
        graph,
        lambda: ([image[None]] for image in images),
        recipe=Recipe(effort=0),
        placement=PLACEMENT,
        total=SAMPLES,
        progress=Silent(),
    )


def kernels(model: Path, folder: Path) -> list[EngineLayer]:
    shapes = {"image": ((1, 1, 48, 48), (4, 1, 48, 48), (8, 1, 48, 48))}
    options = BuildOptions(shapes=shapes, capabilities=("SM89",), seconds=300)
    built = build_engine(model, folder / "model.engine", TENSORRT_RTX, options)
    found = read_layers(built.layers)
    assert len(found) == len(built.layers), "every line is a kernel"
    return found


@pytest.mark.parametrize("name", MODELS)
def test_eight_bits(name: str, tmp_path: Path) -> None:
    """All products with weights are products of codes; no kernel only makes floats of codes; folded norms are gone."""
    plan, model = planned(name), tmp_path / "model.onnx"
    write_quantized(plan, model, placement=PLACEMENT)
    assert lint(model, TENSORRT_RULES) == []
    found = kernels(model, tmp_path)
    products = [each for each in found if each.kind in PRODUCTS]
    coded = [each for each in products if each.inputs == ("Int8",) and each.constants[:1] == ("Int8",)]
    maps = {source for each in coded for source in each.sources if "Gemm" in source or "Conv" in source}
    assert len(maps) == len(requested_weights(plan.graph))
    floats = [each for each in products if each not in coded]
    assert all("MatMul" in source for each in floats for source in each.sources), "products of two activations"
    for each in found:
        only_dequantizes = bool(each.sources) and all("DequantizeLinear" in source for source in each.sources)
        assert not only_dequantizes, each
    norms = {source for each in found for source in each.sources if "Normalization" in source}
    assert len(norms) == MODELS[name]
    makers = [{source for source in each.sources if source in norms} for each in found if "Int8" in each.outputs]
    assert set().union(*makers) == norms, "a norm and the quantizer behind it are one kernel"


def test_lines_of_another_form_are_no_kernels() -> None:
    assert read_layers(["", "Bindings:", "x"]) == []
