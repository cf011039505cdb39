"""Kernels made by hand, held against a file made by hand: a norm, its codes, a product of codes and one of floats."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from normfuse.fusion_audit import audit
from normfuse.runtime.engine_layers import EngineLayer

PRODUCT = "blocks.0.up"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """``up(norm(x + x))`` of codes, and ``scores`` of its floats with themselves."""
    constants = [
        numpy_helper.from_array(np.float32(0.1), "step"),
        numpy_helper.from_array(np.int8(0), "zero"),
        numpy_helper.from_array(np.ones((6, 4), dtype=np.int8), "weight"),
        numpy_helper.from_array(np.ones(6, dtype=np.float32), "gamma"),
    ]
    up = helper.make_node("MatMul", ["x_read", "w"], ["y"], name="up/MatMul")
    up.metadata_props.add(key="normfuse.layer", value=PRODUCT)
    nodes = [
        helper.make_node("Add", ["x", "x"], ["sum"], name="add"),
        helper.make_node("LayerNormalization", ["sum", "gamma"], ["normed"], name="norm"),
        helper.make_node("Reshape", ["normed", "shape"], ["moved"], name="reshape"),
        helper.make_node("QuantizeLinear", ["moved", "step", "zero"], ["codes"], name="quantize"),
        helper.make_node("DequantizeLinear", ["codes", "step", "zero"], ["x_read"], name="dequantize"),
        helper.make_node("DequantizeLinear", ["weight", "step", "zero"], ["w"], name="weight/dequantize"),
        up,
        helper.make_node("Transpose", ["y"], ["turned"], name="transpose", perm=[1, 0]),
        helper.make_node("MatMul", ["y", "turned"], ["scores"], name="scores/MatMul"),
    ]
    constants.append(numpy_helper.from_array(np.array([5, 6], dtype=np.int64), "shape"))
    graph = helper.make_graph(
        nodes,
        "audited",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [5, 6])],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, [5, 5])],
        constants,
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)])
    onnx.checker.check_model(made)
    onnx.save(made, tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


def kernel(
    *sources: str, inputs: str = "", constants: str = "", outputs: str = "Float", kind: str = "gemm"
) -> EngineLayer:
    return EngineLayer(
        name="made",
        kind=kind,
        inputs=tuple(inputs.split()),
        constants=tuple(constants.split()),
        outputs=tuple(outputs.split()),
        sources=sources,
    )


CODED = kernel("up/MatMul", "dequantize", "weight/dequantize", inputs="Int8", constants="Int8 Float")
FLOATS = kernel("scores/MatMul", inputs="Float Float")
NORM = kernel("add", "norm", "quantize", inputs="Float", constants="Float", outputs="Float Int8")


def test_what_was_asked_for(model: Path) -> None:
    found = audit(model, [NORM, CODED, FLOATS])
    assert found.mismatched == []
    assert found.as_dict() == {
        "kernels": 3,
        "products": {"int8": {"asked": 1, "got": 1}, "fp32": {"asked": 1, "got": 1}},
        "mismatched": [],
        "norms": 1,
        "joined_norms": 1,
        "attentions": 0,
        "joined_attentions": 0,
        "alone": [],
    }


def test_a_product_of_other_types(model: Path) -> None:
    found = audit(model, [kernel("up/MatMul", inputs="Half", constants="Half"), FLOATS]).as_dict()
    assert found["products"]["int8"] == {"asked": 1, "got": 0}
    assert found["mismatched"] == [{"layer": PRODUCT, "asked": "int8", "got": ["Half", "Half"]}]


def test_a_product_with_codes_on_one_side_alone_is_none_of_codes(model: Path) -> None:
    """Codes that are read as floats by the product: the types of both operands count, not one of them."""
    found = audit(model, [kernel("up/MatMul", inputs="Float", constants="Float"), FLOATS])
    assert [product.layer for product, _ in found.mismatched] == [PRODUCT]


@pytest.mark.parametrize(
    "layer",
    [
        # As TensorRT-RTX builds a product whose activations have a scale per channel, and weights one per input.
        kernel("up/MatMul", inputs="Int8", constants="Half Int8 Half", kind="runtime_fusion"),
        # A residual of codes behind a product of floats.
        kernel("up/MatMul", inputs="Half Int8", constants="Half"),
        kernel("up/MatMul", inputs="Int8 Half", constants="Half"),
    ],
)
def test_a_product_that_makes_floats_of_its_codes_is_none_of_codes(model: Path, layer: EngineLayer) -> None:
    assert [product.layer for product, _ in audit(model, [layer, FLOATS]).mismatched] == [PRODUCT]


def test_a_product_that_no_kernel_names(model: Path) -> None:
    found = audit(model, [NORM, FLOATS]).as_dict()
    assert found["mismatched"] == [{"layer": PRODUCT, "asked": "int8", "got": None}]


@pytest.mark.parametrize("is_first", [True, False])
def test_a_kernel_that_prepares_the_input_names_the_product_too(model: Path, is_first: bool) -> None:
    prepares = kernel("quantize", "up/MatMul", inputs="Float", outputs="Int8")
    layers = [prepares, CODED] if is_first else [CODED, prepares]
    assert audit(model, [*layers, FLOATS]).mismatched == []


@pytest.mark.parametrize(
    ("layer", "joined"),
    [
        (kernel("add", "norm", inputs="Float"), 1),
        (kernel("norm", "quantize", inputs="Float", outputs="Int8"), 1),
        (kernel("norm", inputs="Float", outputs="Int8"), 1),
        (kernel("norm", inputs="Half", outputs="FP8"), 1),
        (kernel("norm", inputs="Float"), 0),
        (kernel("norm", "reshape", inputs="Float"), 0),
    ],
)
def test_norms_that_share_a_kernel(model: Path, layer: EngineLayer, joined: int) -> None:
    found = audit(model, [layer, CODED, FLOATS])
    assert (found.norms, found.joined_norms) == (1, joined)


@pytest.mark.parametrize(
    ("sources", "joined"),
    [
        ([("scores", "softmax", "mixed")], 1),
        ([("scores",), ("softmax", "mixed")], 0),
        ([("scores", "softmax"), ("softmax", "mixed")], 0),
        ([("softmax", "scores", "scores"), ("mixed",)], 0),
    ],
)
@pytest.mark.parametrize("is_masked", [False, True])
def test_attention_that_is_one_kernel(
    tmp_path: Path, sources: list[tuple[str, ...]], joined: int, is_masked: bool
) -> None:
    """Whatever is put in the place of rows that are masked as a whole, it is attention."""
    masking = [onnx.helper.make_node("Where", ["m", "z", "p"], ["read"], name="where")]
    attention = onnx.helper.make_graph(
        [
            onnx.helper.make_node("MatMul", ["q", "k"], ["s"], name="scores"),
            onnx.helper.make_node("Softmax", ["s"], ["p"], name="softmax"),
            *(masking if is_masked else []),
            onnx.helper.make_node("MatMul", ["read" if is_masked else "p", "v"], ["y"], name="mixed"),
        ],
        "attention",
        [
            onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)
            for name, shape in {"q": [3, 5], "k": [5, 7], "v": [7, 2], "z": []}.items()
        ]
        + [onnx.helper.make_tensor_value_info("m", onnx.TensorProto.BOOL, [3, 1])],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [3, 2])],
    )
    opset = [onnx.helper.make_opsetid("", 21)]
    onnx.save(onnx.helper.make_model(attention, opset_imports=opset), tmp_path / "attention.onnx")
    layers = [kernel(*each, inputs="Float Float", outputs="Float") for each in sources]
    found = audit(tmp_path / "attention.onnx", layers)
    assert (found.attentions, found.joined_attentions) == (1, joined)


@pytest.mark.parametrize(
    ("layer", "alone"),
    [
        (kernel("quantize", inputs="Float", outputs="Int8"), ("quantize",)),
        (kernel("reshape", "quantize", inputs="Float", outputs="Int8"), ("quantize",)),
        (kernel("dequantize", "transpose", inputs="Int8", outputs="Float"), ("dequantize",)),
        (kernel("quantize", "dequantize", "reshape", inputs="Int8", outputs="Int8"), ()),
        (kernel("weight/dequantize", constants="Int8", outputs="Float"), ()),
        (kernel("norm", "quantize", inputs="Float", outputs="Int8"), ()),
        (kernel("reshape", inputs="Float", outputs="Half"), ()),
        (kernel(inputs="Float", outputs="Int8"), ()),
    ],
    ids=[
        "quantizes",
        "moves too",
        "dequantizes",
        "codes are moved",
        "constants",
        "computes",
        "no quantizer",
        "unnamed",
    ],
)
def test_quantizers_with_a_kernel_of_their_own(model: Path, layer: EngineLayer, alone: tuple[str, ...]) -> None:
    assert audit(model, [layer, CODED, FLOATS]).alone == alone


def test_a_quantizer_of_two_kernels_is_told_once(model: Path) -> None:
    twice = kernel("quantize", inputs="Float", outputs="Int8")
    assert audit(model, [twice, twice, CODED, FLOATS]).alone == ("quantize",)


def test_no_kernels_and_unknown_sources(model: Path) -> None:
    assert audit(model, []).as_dict()["kernels"] == 0
    found = audit(model, [kernel("of nobody", inputs="Float", outputs="Half"), CODED, FLOATS])
    assert (found.kernels, found.mismatched, found.alone) == (3, [], ())
