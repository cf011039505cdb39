"""What is compiled for TensorRT keeps every rule, and becomes the kernels that were asked for."""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

import pytest

from benchmarks.deit import deit_small, images
from benchmarks.engine_networks import NETWORKS, network
from examples.zoo.data import make
from examples.zoo.train import WEIGHTS
from normfuse.compiler import Built
from normfuse.compiler import compile as compile_model
from normfuse.recipe import Recipe
from normfuse.runtime.engine_layers import read_layers

CONVOLUTIONAL = ("resnet", "mobilenet")

BUDGETS = {name: "avg-bits=9" if name in CONVOLUTIONAL else "avg-bits=7" for name in NETWORKS}
"""Of mixed bits: between the fewest that a network can have and eight, or above where it has few linear maps."""

KINDS = ("fp16", "8", "fp8", "4", "mixed")

TYPES = {
    "fp16": {"fp16"},
    "8": {"int8", "fp16"},
    "fp8": {"fp8", "fp16"},
    "4": {"int4", "int8", "fp16"},
    "mixed": {"int4", "int8", "fp16"},
}
"""The types that products may have: floats are those of attention and, of 8-bit floats, convolutions."""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("tensorrt_rtx") is None,
        reason="tensorrt-rtx is not installed: pip install '.[trt-rtx]'",
    ),
]


@functools.lru_cache(maxsize=1)
def given(name: str) -> tuple[Any, Any]:
    return network(name)


def compiled(name: str, bits: str) -> Built:
    model, samples = given(name)
    mixed = {"budget": BUDGETS[name], "score": "sqnr"} if bits == "mixed" else {}
    recipe = Recipe(target="trt", bits=bits, effort=0, max_drop=100, capability="8.9", **mixed)
    return compile_model(model, (samples,), calibration={"x": samples.numpy()}, recipe=recipe)


def facts(built: Built) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what a report says of the file, and of the engine's kernels."""
    assert built.failure is None, str(built.failure)
    assert built.report["verdict"]["verdict"] == "kept", built.report["verdict"]
    told = built.report["tensorrt"]
    return told, told["engine"]["audit"]


@pytest.mark.parametrize("bits", KINDS)
@pytest.mark.parametrize("name", NETWORKS)
def test_products_have_the_types_that_were_asked_for(name: str, bits: str) -> None:
    told, audit = facts(compiled(name, bits))
    assert told["lint"] == []
    assert audit["mismatched"] == []
    asked = {kind.split(" ")[0]: row["asked"] for kind, row in audit["products"].items()}
    assert asked.keys() <= TYPES[bits]
    weighted = [each for each in told["products"] if each["has_weight"]]
    if bits in ("8", "4"):
        assert all(each["type"] != "fp16" for each in weighted), "every product with a weight has codes"
    if bits == "fp8":
        floats = [each for each in told["products"] if each["type"] != "fp8" and each["operator"] != "Conv"]
        assert not any(each["has_weight"] for each in floats)
        assert name == "swin" or not floats, "attention, but where a mask of floats is computed for every window"
    if bits == "4":
        linear = [each for each in weighted if each["operator"] != "Conv"]
        assert all(each["type"].startswith("int4") for each in linear)
    if bits == "mixed":
        assert len({each["type"].split(" ")[0] for each in weighted}) > 1
    assert not [each for each in audit["alone"] if "Dequantize" in each], "no kernel only makes floats of codes"
    if bits in ("8", "fp8"):
        is_whole = audit["joined_attentions"] == audit["attentions"]
        assert name == "swin" or is_whole, "one kernel, but where every window has a mask of floats of its own"
        assert audit["joined_norms"] >= audit["norms"] - 1, "a norm shares its kernel with its quantizer, but the last"


def test_fewer_bits_make_smaller_engines() -> None:
    """Of a network whose weights are most of the engine; of smaller ones kernels are."""
    sizes = {bits: facts(compiled("vit-s", bits))[0]["engine"]["bytes"] for bits in ("32", "fp16", "8", "4")}
    assert sizes["4"] < sizes["8"] < sizes["fp16"] < sizes["32"]
    assert sizes["8"] <= 0.40 * sizes["32"]
    assert sizes["4"] <= 0.27 * sizes["32"]


def test_folded_norms_are_gone() -> None:
    """A ViT whose norms were unified has fewer kernels than the same with layer norms, and none of them a norm."""
    found = {}
    for norm in ("LN", "UN"):
        model = deit_small(norm, layers=2)
        recipe = Recipe(target="trt", effort=0, max_drop=100, capability="8.9")
        built = compile_model(model, (images(2),), calibration={"image": images(2).numpy()}, recipe=recipe)
        found[norm] = facts(built)[1]
    assert found["LN"]["norms"] == 5
    assert found["UN"]["norms"] == 0
    assert found["UN"]["kernels"] < found["LN"]["kernels"]


@pytest.mark.parametrize(
    ("name", "norms"),
    [("glyphs_vit_un", 0), ("glyphs_vit_ln", 11), ("glyphs_swin_prepbn", 0), ("glyphs_resnet_bn", 0)],
)
def test_trained_networks(name: str, norms: int) -> None:
    calibration, _ = make("glyphs", "calib", 8, 0)
    recipe = Recipe(target="trt", effort=0, capability="8.9", max_drop=100)
    told, audit = facts(compile_model(WEIGHTS / f"{name}.pt2", calibration=calibration, recipe=recipe))
    assert told["lint"] == []
    assert audit["mismatched"] == []
    assert audit["norms"] == norms
    assert audit["joined_attentions"] == audit["attentions"]


def test_lines_of_another_form_are_no_kernels() -> None:
    assert read_layers(["", "Bindings:", "x"]) == []
