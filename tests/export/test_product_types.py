"""Which types the products of a file have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from float_files import sample, written

from normfuse.export.body import write_body
from normfuse.export.product_types import ProductType, product_types
from normfuse.quant.target import BodyType

EIGHT = "c = QuantizeLinear (x, s, zero)  v = DequantizeLinear (c, s, zero)"
ZEROS = {"int8": np.int8(0), "fp8": np.array(0, ml_dtypes.float8_e4m3fn), "uint8": np.uint8(3)}


def codes(kind: str, *shape: int) -> Any:
    held = np.random.default_rng(2).integers(-7, 8, shape)
    types = {"int8": np.int8, "int4": ml_dtypes.int4, "fp8": ml_dtypes.float8_e4m3fn}
    return held.astype(np.float32).astype(types[kind]) if kind == "fp8" else held.astype(types[kind])


def only(path: Path) -> ProductType:
    (found,) = product_types(path)
    return found


@pytest.mark.parametrize("kind", ["int8", "fp8"])
@pytest.mark.parametrize("move", ["", "t = Transpose (w)", "r = Transpose (w)  t = Identity (r)"])
def test_products_of_codes(kind: str, move: str, tmp_path: Path) -> None:
    right, shape = ("t", (3, 8)) if move else ("w", (8, 3))
    text = f"""g (float[n,8] x) => (float[n,3] y)
    {{ {EIGHT} w = DequantizeLinear <axis={1 - bool(move)}> (codes, sw)  {move}  y = MatMul (v, {right}) }}"""
    held: dict[str, Any] = {
        "codes": codes(kind, *shape),
        "s": np.float32(0.1),
        "zero": ZEROS[kind],
        "sw": np.abs(sample(3)),
    }
    found = only(written(tmp_path / "m.onnx", text, **held))
    assert (found.node, found.layer, found.operator) == ("y/MatMul", "layers.y", "MatMul")
    assert (found.left, found.right, found.spelled, found.has_weight, found.block) == (kind, kind, kind, True, 0)
    assert found.as_dict() == {"layer": "layers.y", "operator": "MatMul", "type": kind, "has_weight": True}


@pytest.mark.parametrize("body", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("move", [False, True])
def test_blocks_of_four_bits_behind_floats(move: bool, body: str, tmp_path: Path) -> None:
    moved = "t = Transpose (w)  y = MatMul (u, t)" if move else "y = MatMul (u, w)"
    text = f"""g (float[n,32] x) => (float[n,6] y)
    {{ u = Tanh (x)  w = DequantizeLinear <axis={int(move)}, block_size=16> (codes, s)  {moved} }}"""
    shape, scales = ((6, 32), (6, 2)) if move else ((32, 6), (2, 6))
    path = written(tmp_path / "m.onnx", text, codes=codes("int4", *shape), s=np.abs(sample(*scales)) + 0.1)
    if body != "fp32":
        write_body(path, path := tmp_path / "typed.onnx", BodyType(body), {})
    found = only(path)
    assert (found.left, found.right, found.block, found.has_weight) == (body, "int4", 16, True)
    assert found.spelled == f"int4 in blocks of 16 x {body}"


@pytest.mark.parametrize("body", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("move", [False, True])
@pytest.mark.parametrize("largest", [1.0, 1e38])
def test_products_of_floats(body: str, move: bool, largest: float, tmp_path: Path) -> None:
    moved = "t = Transpose (w)  y = MatMul (u, t)" if move else "y = MatMul (u, w)"
    text = f"g (float[n,8] x) => (float[n,3] y) {{ u = Tanh (x)  {moved} }}"
    path = written(tmp_path / "m.onnx", text, w=sample(3, 8) if move else sample(8, 3))
    if body != "fp32":
        write_body(path, path := tmp_path / "typed.onnx", BodyType(body), {"y": largest})
    found = only(path)
    assert found.spelled == ("fp32" if largest > 1 else body), "as it computes"
    assert found.has_weight


def test_codes_of_activations_behind_float_weights_and_the_reverse(tmp_path: Path) -> None:
    text = f"""g (float[n,8] x) => (float[n,3] y, float[n,3] z)
    {{ {EIGHT} w = DequantizeLinear <axis=1> (codes, sw)  y = MatMul (v, f)  z = MatMul (x, w) }}"""
    held: dict[str, Any] = {
        "codes": codes("int8", 8, 3),
        "s": np.float32(0.1),
        "zero": ZEROS["uint8"],
        "sw": np.abs(sample(3)),
    }
    found = product_types(written(tmp_path / "m.onnx", text, f=sample(8, 3), **held))
    assert [each.spelled for each in found] == ["fp32 x uint8", "int8 x fp32"]
    assert [each.has_weight for each in found] == [True, True]


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_products_of_two_activations_have_no_weight(kind: str, tmp_path: Path) -> None:
    text = """g (float[2,5,8] q, float[2,5,8] k) => (float[2,5,5] y, float[2,5,5] z)
    { a = QuantizeLinear (q, s, zero)  b = DequantizeLinear (a, s, zero)
      c = QuantizeLinear (k, s, zero)  d = DequantizeLinear (c, s, zero)
      e = Transpose <perm=[0, 2, 1]> (d)  y = MatMul (b, e)
      f = Transpose <perm=[0, 2, 1]> (k)  z = MatMul (q, f) }"""
    found = product_types(written(tmp_path / "m.onnx", text, s=np.float32(0.1), zero=ZEROS[kind]))
    assert [(each.spelled, each.has_weight) for each in found] == [(kind, False), ("fp32", False)]


@pytest.mark.parametrize("body", ["fp32", "fp16"])
def test_convolutions_and_products_of_rows(body: str, tmp_path: Path) -> None:
    text = f"""g (float[2,4,9] x, float[n,5] m) => (float[2,6,7] y, float[2,6,11] z, float[n,3] r)
    {{ {EIGHT} w = DequantizeLinear <axis=0> (codes, sw)  y = Conv (v, w, b)  z = ConvTranspose (x, f)
       r = Gemm <transB=1> (m, g, h)  u = Relu (y) }}"""
    held: dict[str, Any] = {
        "codes": codes("int8", 6, 4, 3),
        "s": np.float32(0.1),
        "zero": ZEROS["int8"],
        "sw": np.abs(sample(6)),
    }
    held |= {"b": sample(6), "f": sample(4, 6, 3), "g": sample(3, 5), "h": sample(3)}
    path = written(tmp_path / "m.onnx", text, **held)
    if body != "fp32":
        write_body(path, path := tmp_path / "typed.onnx", BodyType(body), {})
    found = {each.operator: each for each in product_types(path)}
    assert list(found) == ["Conv", "ConvTranspose", "Gemm"], "in the file's order"
    assert [each.spelled for each in found.values()] == ["int8", body, body]
    assert all(each.has_weight for each in found.values())


def test_weights_that_the_file_quantizes_itself(tmp_path: Path) -> None:
    text = f"""g (float[n,8] x) => (float[n,3] y)
    {{ {EIGHT} q = QuantizeLinear (f, s, zero)  w = DequantizeLinear (q, s, zero)  y = MatMul (v, w) }}"""
    found = only(written(tmp_path / "m.onnx", text, f=sample(8, 3), s=np.float32(0.1), zero=ZEROS["int8"]))
    assert (found.spelled, found.has_weight) == ("int8", True)


def test_constants_in_nodes_and_names_that_miss(tmp_path: Path) -> None:
    text = "g (float[n,2] x) => (float[n,1] y) { w = Constant <value=float[2,1] {1.0, 2.0}> ()  y = MatMul (x, w) }"
    path = written(tmp_path / "m.onnx", text)
    model = onnx.load(path)
    for node in model.graph.node:
        del node.metadata_props[:]
    onnx.save(model, path)
    found = only(path)
    assert (found.layer, found.spelled, found.has_weight) == ("y/MatMul", "fp32", True)
    model.graph.node[1].name = ""
    onnx.save(model, path)
    assert only(path).layer == ""
