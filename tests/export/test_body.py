"""A file of float32 gets the type of its engine, and what would lose by it keeps its own."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from float_files import floats, outcome, sample, types_of, written
from onnx import TensorProto as T
from typed_files import BODIES, KINDS, TINIEST, UNIT, typed

from normfuse.export.body import TypedBody
from normfuse.export.widened import write_widened
from normfuse.quant.target import BodyType

FLOAT, HALF, BRAIN = T.FLOAT, T.FLOAT16, T.BFLOAT16


def read_types(path: Path) -> dict[str, list[int]]:
    """Return what every node reads, by its name."""
    types = types_of(path)
    return {node.name: [types[name] for name in node.input if name] for node in onnx.load(path).graph.node}


def makes(path: Path) -> dict[str, int]:
    """Return the type of every node's first result, by its name."""
    types = types_of(path)
    return {node.name: types[node.output[0]] for node in onnx.load(path).graph.node}


def reasons(found: TypedBody) -> dict[str, str]:
    return {layer: reason for layer, _, reason in found.wide}


def constants_of(path: Path) -> dict[str, Any]:
    return {each.name: onnx.numpy_helper.to_array(each) for each in onnx.load(path).graph.initializer}


def quantizer_scales(path: Path) -> dict[str, Any]:
    """Return the scale of every quantizer and dequantizer of a file, by the node's name."""
    held = constants_of(path)
    nodes = [node for node in onnx.load(path).graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    return {node.name: held[node.input[1]] for node in nodes}


@BODIES
def test_products_are_narrow_and_ports_are_not(body: BodyType, tmp_path: Path) -> None:
    text = "g (float[n,7] x) => (float[n,3] y) { p = MatMul (x, w)  q = Add (p, b)  y = Relu (q) }"
    source = written(tmp_path / "m.onnx", text, w=sample(7, 3), b=sample(3))
    found, path = typed(source, body)
    assert (found.nodes, found.usual, found.wide, found.body) == (2, {}, (), body)
    kind = KINDS[body]
    made = makes(path)
    assert made["p/MatMul"] == made["q/Add"] == made["y/Relu"] == kind
    assert {types_of(path)[name] for name in ("x", "y")} == {FLOAT}
    assert sorted(node.op_type for node in onnx.load(path).graph.node) == ["Add", "Cast", "Cast", "MatMul", "Relu"]
    assert {each.data_type for each in onnx.load(path).graph.initializer} == {kind}
    assert onnx.load(path).opset_import[0].version == (22 if body is BodyType.BF16 else 21)


@BODIES
def test_a_product_is_off_by_its_roundings(body: BodyType, tmp_path: Path) -> None:
    text = "g (float[n,9] x) => (float[n,5] y) { p = MatMul (x, w)  y = Add (p, b) }"
    x, w, b = sample(13, 9), sample(9, 5), sample(5)
    _, path = typed(written(tmp_path / "m.onnx", text, w=w, b=b), body)
    if body is BodyType.BF16:
        write_widened(path, path := path.with_name("widened.onnx"))
    # Both factors, nine products and their sums, and the bias are rounded; so is what is returned, twice.
    wide = [each.astype(np.float64) for each in (x, w, b)]
    magnitude = np.abs(wide[0]) @ np.abs(wide[1]) + np.abs(wide[2])
    error = np.abs(outcome(path, x=x)["y"] - (wide[0] @ wide[1] + wide[2]))
    assert (error <= (2 + 9 + 2) * UNIT[body] * magnitude).all()
    assert error.max() > 0.01 * UNIT[body] * magnitude.max(), "something was rounded"


USUAL = [
    ("LayerNormalization (x, s, s)", "LayerNormalization"),
    ("InstanceNormalization (x, c, c)", "InstanceNormalization"),
    ("BatchNormalization (x, c, c, c, v)", "BatchNormalization"),
    ("Softmax (x)", "Softmax"),
    ("LogSoftmax (x)", "LogSoftmax"),
    ("Exp (x)", "Exp"),
    ("Pow (x, two)", "Pow"),
    ("ReduceMean <keepdims=1> (x, last)", "ReduceMean"),
    ("ReduceSum <keepdims=1> (x, last)", "ReduceSum"),
    ("CumSum (x, one)", "CumSum"),
    ("LpNormalization (x)", "LpNormalization"),
]


@pytest.mark.parametrize(("call", "operator"), USUAL, ids=[operator for _, operator in USUAL])
@BODIES
def test_norms_and_sums_stay_wide_between_narrow_products(
    body: BodyType, call: str, operator: str, tmp_path: Path
) -> None:
    text = f"g (float[2,3,5] a) => (float[m,3,n] z) {{ x = Mul (a, s)  y = {call}  z = Mul (y, t) }}"
    held: dict[str, Any] = {"s": sample(5), "t": sample(1), "c": sample(3), "v": np.abs(sample(3)) + 1}
    held |= {"two": np.float32(2), "last": np.array([2]), "one": np.array(2)}
    words = set(re.findall(r"\w+", call)) | {"s", "t"}
    read = {name: values for name, values in held.items() if name in words}
    found, path = typed(written(tmp_path / "m.onnx", text, **read), body)
    assert (found.nodes, found.usual, found.wide) == (2, {operator: 1}, ())
    made, floats = makes(path), {FLOAT, HALF, BRAIN}
    assert made["x/Mul"] == made["z/Mul"] == KINDS[body]
    assert made[f"y/{operator}"] == FLOAT
    assert {kind for kind in read_types(path)[f"y/{operator}"] if kind in floats} == {FLOAT}


@pytest.mark.parametrize(("body", "most"), [(BodyType.FP16, 512.0), (BodyType.BF16, 64.0)])
@pytest.mark.parametrize("kind", ["int64", "int32", "int8"])
def test_who_reads_more_integers_than_the_type_counts_stays_wide(
    kind: str, body: BodyType, most: float, tmp_path: Path
) -> None:
    text = f"""g ({kind}[n,5] x) => (float[n,5] y)
    {{ a = Cast <to=1> (x)  r = Reshape (a, sizes)  b = Mul (r, s)  c = Add (b, s)  d = Sin (c)  y = Tanh (d) }}"""
    source = written(tmp_path / "m.onnx", text, s=sample(5), sizes=np.array([-1, 5]))
    found, _ = typed(source, body, largest={"a": most, "r": most, "b": 1e4, "c": 1.0})
    assert not found.wide, "every one of them is held"
    found, path = typed(source, body, largest={"a": most + 1, "r": most + 1, "b": 1e4, "c": 1.0})
    wide = [] if kind == "int8" else ["a/Cast", "b/Mul", "c/Add", "d/Sin"]
    assert reasons(found) == {f"layers.{each[0]}": f"of whole numbers up to {most + 1:.3g}" for each in wide}
    made = makes(path)
    assert {name for name in made if made[name] == FLOAT and name != "y/Tanh"} >= set(wide)
    assert made["d/Sin"] == (KINDS[body] if kind == "int8" else FLOAT)


@pytest.mark.parametrize(("seen", "is_wide"), [(3.1e-5, False), (3.0e-5, True), (1e-9, True), (0.0, False)])
def test_who_touches_a_tensor_of_small_numbers_stays_wide(seen: float, is_wide: bool, tmp_path: Path) -> None:
    text = "g (float[n,5] x) => (float[n,5] y) { a = Mul (x, s)  b = Mul (a, a)  c = Mul (b, s)  y = Tanh (c) }"
    source = written(tmp_path / "m.onnx", text, s=sample(5))
    found, _ = typed(source, largest={"a": 1.0, "b": seen, "c": 1.0})
    told = f"values of at most {seen:.3g}"
    assert reasons(found) == ({"layers.b": told, "layers.c": told} if is_wide else {})
    found, _ = typed(source, BodyType.BF16, largest={"a": 1.0, "b": seen, "c": 1.0})
    assert not found.wide, "it has the exponents of float32"


def test_who_touches_a_tensor_near_the_largest_number_stays_wide(tmp_path: Path) -> None:
    text = """g (float[n,5] x) => (float[n,5] y)
    { a = Mul (x, s)  b = Mul (a, s)  r = Reshape (b, sizes)  c = Add (r, s)  y = Tanh (c) }"""
    source = written(tmp_path / "m.onnx", text, s=sample(5), sizes=np.array([-1, 5]))
    limit = 65504 / 4
    found, path = typed(source, largest={"a": limit, "b": limit * 1.001, "r": limit * 1.001, "c": 1.0})
    assert reasons(found) == {"layers.b": "values up to 1.64e+04", "layers.c": "values up to 1.64e+04"}
    made = makes(path)
    assert made["a/Mul"] == made["y/Tanh"] == HALF
    assert made["b/Mul"] == made["r/Reshape"] == made["c/Add"] == FLOAT
    assert typed(source, BodyType.BF16, {"b": limit * 1.001})[0].wide == (), "bfloat16 holds it"


@pytest.mark.parametrize("largest", [np.inf, 1e30])
def test_large_inputs_keep_their_readers_wide(largest: float, tmp_path: Path) -> None:
    text = "g (float[n,5] x) => (float[n,5] y) { a = Mul (x, s)  y = Tanh (a) }"
    found, path = typed(written(tmp_path / "m.onnx", text, s=sample(5)), largest={"x": largest})
    assert list(reasons(found)) == ["layers.a"]
    assert read_types(path)["a/Mul"] == [FLOAT, FLOAT]


CONSTANTS = [
    pytest.param(1e30, "a constant of 1e+30", id="too large"),
    pytest.param(-3.4028235e38, "a constant of 3.4e+38", id="the smallest float32, a mask"),
    pytest.param(1e-12, "a constant of 1e-12", id="an epsilon"),
    pytest.param(6.0e-5, "a constant of 6e-05", id="below the smallest normal number"),
    pytest.param(6.2e-5, None, id="above it"),
    pytest.param(65504.0, None, id="the largest number"),
    pytest.param(65520.0, "a constant of 6.55e+04", id="above the largest"),
    pytest.param(-np.inf, None, id="an infinity, a mask"),
    pytest.param(0.0, None, id="zero"),
    pytest.param([1.0, 1e-12], None, id="small beside an ordinary one"),
    pytest.param([-np.inf, 0.0], None, id="a mask of two"),
    pytest.param([1.0, np.nan], None, id="not a number"),
]


@pytest.mark.parametrize(("values", "reason"), CONSTANTS)
def test_constants_that_do_not_fit_keep_their_reader_wide(values: Any, reason: str | None, tmp_path: Path) -> None:
    text = "g (float[n,2] x) => (float[n,2] y) { a = Tanh (x)  b = Add (a, c)  y = Tanh (b) }"
    source = written(tmp_path / "m.onnx", text, c=np.float32(values))
    found, path = typed(source)
    assert reasons(found) == ({"layers.b": reason} if reason else {})
    assert makes(path)["b/Add"] == (FLOAT if reason else HALF)
    assert makes(path)["a/Tanh"] == HALF
    (held,) = constants_of(path).values()
    wanted = np.float32(values)
    np.testing.assert_array_equal(held, wanted if reason else wanted.astype(np.float16))


@pytest.mark.parametrize("move", ["Identity (c)", "Expand (c, sizes)", "Gather (c, index)", "Neg (c)"])
@pytest.mark.parametrize("value", [1e30, 1e-12])
def test_constants_that_do_not_fit_are_no_narrower_once_moved(value: float, move: str, tmp_path: Path) -> None:
    text = f"g (float[n,2] x, int64[1] index) => (float[n,2] y) {{ m = {move}  k = Identity (m)  y = Mul (x, k) }}"
    held: dict[str, Any] = (
        {"c": np.full(3, value, np.float32)} if "Gather" in move else {"c": np.full(1, value, np.float32)}
    )
    if "Expand" in move:
        held["sizes"] = np.array([2])
    found, path = typed(written(tmp_path / "m.onnx", text, **held))
    assert reasons(found) == {"layers.y": f"a constant of {value:.3g}"}
    x = sample(3, 2)
    before, after = outcome(tmp_path / "m.onnx", x=x, index=np.array([1])), outcome(path, x=x, index=np.array([1]))
    np.testing.assert_array_equal(after["y"], before["y"])


PAIR = """
    c = QuantizeLinear (x, sx, zero)  v = DequantizeLinear (c, sx, zero)
    w = DequantizeLinear <axis=1> (codes, sw)  p = MatMul (v, w)
"""
CODES = np.random.default_rng(5).integers(-127, 128, (7, 3)).astype(np.int8)
ZERO = np.int8(0)


@BODIES
def test_codes_have_scales_of_the_floats_beside_them(body: BodyType, tmp_path: Path) -> None:
    text = f"g (float[n,7] a) => (float[n,3] y) {{ x = Tanh (a) {PAIR} y = Tanh (p) }}"
    held: dict[str, Any] = {"sx": np.float32(1 / 127), "sw": np.abs(sample(3)) / 100, "codes": CODES, "zero": ZERO}
    found, path = typed(written(tmp_path / "m.onnx", text, **held), body)
    assert not found.wide
    kinds = read_types(path)
    assert kinds["c/QuantizeLinear"] == [KINDS[body], KINDS[body], T.INT8]
    assert kinds["p/MatMul"] == [KINDS[body]] * 2
    assert not [name for name, kind in types_of(path).items() if kind == FLOAT and name not in ("a", "y")]


def test_an_input_is_quantized_as_it_is_by_the_scale_of_its_values(tmp_path: Path) -> None:
    text = f"g (float[n,7] x) => (float[n,3] p) {{ {PAIR} }}"
    held: dict[str, Any] = {"sx": np.float32(0.0123456), "sw": np.abs(sample(3)) / 100, "codes": CODES, "zero": ZERO}
    _, path = typed(written(tmp_path / "m.onnx", text, **held))
    assert read_types(path)["c/QuantizeLinear"] == [FLOAT, FLOAT, T.INT8]
    scales = quantizer_scales(path)
    rounded = np.float32(0.0123456).astype(np.float16)
    assert rounded != np.float32(0.0123456)
    assert scales["c/QuantizeLinear"].dtype == np.float32
    assert scales["c/QuantizeLinear"] == rounded
    (values,) = [scale for name, scale in scales.items() if name.startswith("v/")]
    assert (values.dtype, values) == (np.float16, rounded)


@pytest.mark.parametrize(("which", "scale"), [("sx", 1e-7), ("sx", 1e5), ("sw", 1e-9), ("sw", 7e4)])
def test_a_product_with_a_scale_that_does_not_fit_is_wide(which: str, scale: float, tmp_path: Path) -> None:
    text = f"g (float[n,7] a) => (float[n,3] y) {{ x = Mul (a, size) {PAIR} y = Tanh (p) }}"
    held: dict[str, Any] = {"sx": np.float32(0.01), "sw": floats([0.02, 0.01, 0.03]), "codes": CODES, "zero": ZERO}
    held |= {"size": floats([0.5])}
    held[which] = np.float32(scale) if which == "sx" else floats([0.02, scale, 0.03])
    source = written(tmp_path / "m.onnx", text, **held)
    found, path = typed(source)
    assert reasons(found) == {"layers.p": f"a scale of {scale:.3g}"}
    assert read_types(path)["p/MatMul"] == [FLOAT, FLOAT]
    scales = [each for each in quantizer_scales(path).values() if each.ndim == (which == "sw")]
    assert {each.dtype for each in scales} == {np.dtype(np.float32)}
    assert all((each == held[which]).all() for each in scales), "as it was"


def test_codes_of_tiny_floats_are_what_they_were(tmp_path: Path) -> None:
    """A quantizer between narrow floats whose scale is below the type's numbers reads them widened."""
    text = f"g (float[n,7] a) => (float[n,3] p, int8[n,7] c) {{ b = Mul (a, size)  x = Mul (b, size) {PAIR} }}"
    held: dict[str, Any] = {"sx": np.float32(2e-7), "sw": floats([0.02, 0.01, 0.03]), "codes": CODES, "zero": ZERO}
    source = written(tmp_path / "m.onnx", text, size=floats([0.003]), **held)
    found, path = typed(source)
    assert list(reasons(found)) == ["layers.p"]
    assert makes(path)["x/Mul"] == HALF
    x = sample(11, 7)
    before, after = outcome(source, a=x), outcome(path, a=x)
    assert np.abs(before["c"].astype(int)).max() > 100
    # What is quantized was rounded five times (an input, the constants, products); then codes are rounded.
    most = np.ceil(127 * 5 * UNIT[BodyType.FP16] + TINIEST / 2e-7)
    assert np.abs(before["c"].astype(int) - after["c"].astype(int)).max() <= most


@pytest.mark.parametrize(
    "chain",
    [
        pytest.param("t = Transpose (w)  m = MatMul (v, t)", id="one move"),
        pytest.param("u = Transpose (w)  t = Identity (u)  m = MatMul (v, t)", id="two"),
        pytest.param("u = Transpose (w)  r = Reshape (u, shape)  t = Relu (r)  m = MatMul (v, t)", id="three"),
    ],
)
def test_moved_codes_keep_a_scale_that_does_not_fit(chain: str, tmp_path: Path) -> None:
    text = f"""g (float[7,7] x) => (float[a,b] y) {{
    v = Tanh (x)  w = DequantizeLinear (codes, s)  {chain}  y = Mul (m, back) }}"""
    held: dict[str, Any] = {"codes": CODES.T.copy(), "s": np.float32(1e-9), "back": floats([1e9])}
    if "shape" in chain:
        held["shape"] = np.array([7, 3])
    source = written(tmp_path / "m.onnx", text, **held)
    _, path = typed(source, BodyType.FP16)
    x = sample(7, 7)
    before, after = outcome(source, x=x)["y"], outcome(path, x=x)["y"]
    # tanh is rounded, and of seven products of up to 127 each nothing else.
    assert np.abs(after - before).max() <= 7 * 127 * UNIT[BodyType.FP16]


def test_moved_codes_that_are_returned_keep_a_scale_that_does_not_fit(tmp_path: Path) -> None:
    text = "g (int64[1] i) => (float[3,7] y) { w = DequantizeLinear (codes, s)  y = Transpose (w) }"
    _, path = typed(written(tmp_path / "m.onnx", text, codes=CODES, s=np.float32(1e-9)))
    np.testing.assert_array_equal(outcome(path, i=np.array([0]))["y"], CODES.T * np.float32(1e-9))


def test_codes_that_a_wide_and_a_narrow_node_read_are_written_for_each(tmp_path: Path) -> None:
    text = """g (float[n,7] x) => (float[n,7] y, float[n,7] z)
    { c = QuantizeLinear (x, s, zero)  v = DequantizeLinear (c, s, zero)  y = Softmax (v)  z = Mul (v, f) }"""
    _, path = typed(written(tmp_path / "m.onnx", text, s=np.float32(0.0123456), zero=ZERO, f=sample(7)))
    model = onnx.load(path)
    made = makes(path)
    values = [node for node in model.graph.node if node.op_type == "DequantizeLinear"]
    assert sorted(made[node.name] for node in values) == [FLOAT, HALF]
    assert {node.input[0] for node in values} == {"c"}
    assert {node.metadata_props[0].value for node in values} == {"layers.v"}
    assert len({float(scale) for scale in quantizer_scales(path).values()}) == 1
    assert not [node for node in model.graph.node if node.op_type == "Cast" and node.input[0] in "v"]


@BODIES
def test_values_that_are_returned_agree_with_the_codes(body: BodyType, tmp_path: Path) -> None:
    text = """g (float[n,7] x) => (float[n,7] v, float[n,7] z)
    { c = QuantizeLinear (x, s, zero)  v = DequantizeLinear (c, s, zero)  z = Mul (v, f) }"""
    _, path = typed(written(tmp_path / "m.onnx", text, s=np.float32(0.0123456), zero=ZERO, f=sample(7)), body)
    scales = quantizer_scales(path)
    assert {kind.dtype for kind in scales.values()} >= {np.dtype(np.float32)}
    assert len({float(scale) for scale in scales.values()}) == 1


def test_inputs_that_onnx_allows_in_float32_alone_stay_so(tmp_path: Path) -> None:
    text = """g (float[1,2,3,5] x, float[1] end1) => (float[1,2,a,b] y, float[m] z)
    { t = Tanh (x)  y = Resize (t, , factors)  end = Squeeze (end1)  e = Mul (end, half)
      r = Range (zero, e, one)  z = Mul (r, half) }"""
    held: dict[str, Any] = {
        "factors": floats([1, 1, 2, 3]),
        "zero": np.float32(0),
        "one": np.float32(1),
        "half": np.float32(0.5),
    }
    source = written(tmp_path / "m.onnx", text, **held)
    found, path = typed(source)
    assert not found.wide
    kinds = read_types(path)
    assert kinds["y/Resize"] == [HALF, FLOAT]
    assert kinds["r/Range"] == [FLOAT] * 3
    assert kinds["z/Mul"] == [HALF, HALF]
    made = outcome(path, x=sample(1, 2, 3, 5), end1=floats([14]))
    assert made["y"].shape == (1, 2, 6, 15)
    np.testing.assert_array_equal(made["z"], np.arange(7) / 2)


@pytest.mark.parametrize(
    "move",
    [
        "Reshape (t, flat)", "Transpose (t)", "Unsqueeze (t, first)", "Flatten (t)", "Identity (t)", "Relu (t)",
        "Neg (t)", "Abs (t)", "Gather (t, first)", "Slice (t, first, last)", "Tile (t, twice)", "Expand (t, twice)",
    ],
)  # fmt: skip
@pytest.mark.parametrize("maker", ["Tanh (x)", "Softmax (x)"])
def test_moves_have_the_type_of_what_they_read(maker: str, move: str, tmp_path: Path) -> None:
    text = f"g (float[2,3] x) => (float[] y) {{ t = {maker}  m = {move}  y = Sigmoid (m) }}"
    held: dict[str, Any] = {
        "flat": np.array([-1]),
        "first": np.array([0]),
        "last": np.array([1]),
        "twice": np.array([2, 3]),
    }
    held["twice"] = np.array([2, 1]) if "Tile" in move else np.array([2, 2, 3])
    read = {name: values for name, values in held.items() if name in move}
    found, path = typed(written(tmp_path / "m.onnx", text, **read))
    operator = move.split(maxsplit=1)[0]
    assert makes(path)[f"m/{operator}"] == (FLOAT if "Softmax" in maker else HALF)
    assert (found.nodes, len(found.usual)) == ((1, 1) if "Softmax" in maker else (2, 0))


def test_casts_between_integers_and_floats(tmp_path: Path) -> None:
    text = """g (int64[n,3] i, float[n,3] x, bool[n,3] b) => (float[n,3] y, int32[n,3] k, bool[n,3] l, float[n,3] s)
    { f = Cast <to=1> (i)  m = Cast <to=1> (b)  y = Mul (f, m)  t = Mul (x, f)  k = Cast <to=6> (t)
      l = Cast <to=9> (x)  p = Softmax (f)  s = Cast <to=1> (p) }"""
    source = written(tmp_path / "m.onnx", text)
    _, path = typed(source)
    made = makes(path)
    assert made["f/Cast"] == made["m/Cast"] == made["y/Mul"] == made["t/Mul"] == HALF
    assert (made["k/Cast"], made["l/Cast"], made["s/Cast"]) == (T.INT32, T.BOOL, FLOAT)
    assert read_types(path)["l/Cast"] == [FLOAT]
    feeds = {"i": np.arange(12).reshape(4, 3), "x": np.float32(np.arange(12).reshape(4, 3) - 5), "b": np.eye(4, 3) > 0}
    before, after = outcome(source, **feeds), outcome(path, **feeds)
    for name in ("y", "k", "l"):
        np.testing.assert_array_equal(after[name], before[name])
    np.testing.assert_allclose(after["s"], before["s"], atol=2 * UNIT[BodyType.FP16], rtol=0)


def test_constants_among_what_is_joined_chosen_and_bounded(tmp_path: Path) -> None:
    text = """g (float[n,3] x, bool[n,3] b) => (float[n,6] y)
    { a = Where (b, x, masked)  j = Concat <axis=1> (a, x)  k = Concat <axis=0> (j, row)
      c = Clip (k, low)  d = Clip (c, , high)  o = Constant <value_float=0.5> ()  y = Pad (d, sizes, o) }"""
    held: dict[str, Any] = {
        "masked": np.float32(-np.inf),
        "row": sample(1, 6),
        "low": np.float32(-2),
        "high": np.float32(1.5),
    }
    source = written(tmp_path / "m.onnx", text, **held, sizes=np.array([1, 0, 0, 0]))
    found, path = typed(source)
    assert (found.nodes, found.wide) == (6, ())
    assert {kind for name, kind in makes(path).items() if not name.endswith("float16/Cast")} <= {HALF, FLOAT}
    feeds = {"x": sample(4, 3), "b": np.eye(4, 3) > 0}
    before, after = outcome(source, **feeds)["y"], outcome(path, **feeds)["y"]
    assert np.abs(after - before).max() <= UNIT[BodyType.FP16] * 2, "each number is rounded once, and is 2 at most"


def test_outputs_that_are_read_inside_inputs_and_moves_of_them(tmp_path: Path) -> None:
    text = """g (float[n,3] x, int64[k] i)
    => (float[n,3] y, float[n,3] z, float[n,3] same, float[3,n] turned, float[n,3] w)
    { y = Tanh (x)  z = Mul (y, s)  same = Identity (x)  turned = Transpose (x)  w = Softmax (z) }"""
    source = written(tmp_path / "m.onnx", text, s=sample(3))
    _, path = typed(source)
    made = makes(path)
    assert made["same/Identity"] == made["turned/Transpose"] == FLOAT
    types = types_of(path)
    assert {types[name] for name in ("y", "z", "same", "turned", "w")} == {FLOAT}
    assert read_types(path)["z/Mul"] == [HALF, HALF]
    x = sample(4, 3)
    found = outcome(path, x=x, i=np.array([1]))
    np.testing.assert_array_equal(found["same"], x)
    np.testing.assert_array_equal(found["turned"], x.T)
    assert np.abs(found["y"] - np.tanh(x)).max() <= 3 * UNIT[BodyType.FP16]


def test_outputs_that_are_inputs_or_constants_stay(tmp_path: Path) -> None:
    text = "g (float[n,3] x) => (float[n,3] y, float[3] s, float[2] o, float[n,3] x)"
    text += "{ y = Mul (x, s)  o = Constant <value_floats=[0.1, 0.2]> () }"
    source = written(tmp_path / "m.onnx", text, s=sample(3))
    _, path = typed(source)
    x = sample(4, 3)
    found = outcome(path, x=x)
    np.testing.assert_array_equal(found["s"], sample(3))
    np.testing.assert_array_equal(found["o"], floats([0.1, 0.2]))
    np.testing.assert_array_equal(found["x"], x)


def test_types_that_attributes_name_stay(tmp_path: Path) -> None:
    text = """g (float[n,3] x, int64[4] k) => (float[n,3] y)
    { e = EyeLike <dtype=1> (i)  f = ConstantOfShape <value=float[1] {0.5}> (k2)  a = MatMul (x, e)  y = Add (a, f) }"""
    held: dict[str, Any] = {"i": np.zeros((3, 3), np.int32), "k2": np.array([1, 3])}
    source = written(tmp_path / "m.onnx", text, **held)
    _, path = typed(source)
    x = sample(4, 3).astype(np.float16).astype(np.float32) / 2
    found = outcome(path, x=x, k=np.zeros(4, np.int64))["y"]
    assert np.abs(found - (x + 0.5)).max() <= UNIT[BodyType.FP16] * np.abs(x + 0.5).max()


BRANCHES = """
    chosen = If (ask) <
        then_branch = one () => (float[n,3] u) { u = Add (CAPTURED, s) },
        else_branch = two () => (float[n,3] o) { o = Sub (CAPTURED, s) }
    >
"""


@pytest.mark.parametrize(
    "made", ["Tanh (x)", "Identity (h)", "Softmax (x)", "Relu (x)", "Identity (x)", "DequantizeLinear (q, sc)"]
)
@pytest.mark.parametrize("asked", [True, False])
def test_what_branches_read_is_wide(made: str, asked: bool, tmp_path: Path) -> None:
    more = "h = Tanh (x)" if "(h)" in made else "q = QuantizeLinear (x, sc, zero)" if "q" in made else ""
    branches = BRANCHES.replace("CAPTURED", "t")
    text = f"""g (float[n,3] x, bool ask) => (float[n,3] y, float[n,3] z)
    {{ {more}  t = {made}  {branches}  y = Mul (chosen, s)  z = Mul (t, s) }}"""
    held: dict[str, Any] = {"s": sample(3)} | ({"sc": np.float32(0.0123456), "zero": ZERO} if "q" in made else {})
    source = written(tmp_path / "m.onnx", text, **held)
    found, path = typed(source)
    assert "layers.chosen" in reasons(found)
    made_types = makes(path)
    assert made_types["chosen/If"] == FLOAT
    assert made_types["y/Mul"] == made_types["z/Mul"] == HALF
    feeds = {"x": sample(4, 3) / 3, "ask": np.array(asked)}
    before, after = outcome(source, **feeds), outcome(path, **feeds)
    for name in before:
        assert np.abs(after[name] - before[name]).max() <= 4 * UNIT[BodyType.FP16] * 5
    assert len({float(scale) for scale in quantizer_scales(path).values()}) <= 1


def test_branches_that_read_nothing_from_outside_are_wide(tmp_path: Path) -> None:
    text = """g (float[3] x, bool ask) => (float[3] y)
    { t = Tanh (x)
      chosen = If (ask) <
        then_branch = one () => (float[3] u) { u = Constant <value_floats=[1.0, 2.0, 3.0]> () },
        else_branch = two () => (float[3] o) { o = Constant <value_floats=[0.1, 0.2, 0.3]> () } >
      y = Mul (t, chosen) }"""
    source = written(tmp_path / "m.onnx", text)
    _, path = typed(source)
    x = sample(3)
    for asked in (True, False):
        before, after = (outcome(each, x=x, ask=np.array(asked))["y"] for each in (source, path))
        assert np.abs(after - before).max() <= 4 * 3 * UNIT[BodyType.FP16]


@pytest.mark.parametrize("read", ["k", "s"], ids=["nothing from outside", "a constant from outside"])
def test_loops_are_wide(read: str, tmp_path: Path) -> None:
    text = f"""g (float[3] x, int64 times) => (float[3] y)
    {{ t = Tanh (x)
      last = Loop (times, , t) <body = b (int64 i, bool go, float[3] k) => (bool on, float[3] n)
        {{ on = Identity (go)  n = Add (k, {read}) }}>
      y = Mul (last, s) }}"""
    source = written(tmp_path / "m.onnx", text, s=sample(3))
    _, path = typed(source)
    assert makes(path)["last/Loop"] == FLOAT
    assert makes(path)["t/Tanh"] == HALF
    x = sample(3)
    before, after = (outcome(each, x=x, times=np.array(3))["y"] for each in (source, path))
    # Three roundings in front of the loop, which doubles or adds; then those of a product.
    assert np.abs(after - before).max() <= (8 * 3 + 4 * 8) * UNIT[BodyType.FP16] * np.abs(sample(3)).max()


def test_a_constant_that_wide_and_narrow_nodes_read_is_held_twice(tmp_path: Path) -> None:
    text = "g (float[n,3] x) => (float[n,3] y, float[n,3] z) { y = Pow (x, s)  z = Mul (x, s)  k = Mul (y, s) }"
    text = text.replace("float[n,3] z)", "float[n,3] z, float[n,3] k)")
    s = np.abs(sample(3))
    _, path = typed(written(tmp_path / "m.onnx", text, s=s))
    held = constants_of(path)
    assert sorted(each.dtype.name for each in held.values()) == ["float16", "float32"]
    np.testing.assert_array_equal(held["s"], s)
    assert read_types(path)["y/Pow"] == [FLOAT, FLOAT]


@pytest.mark.parametrize("taken", ["w_float16", "x_float16", "y_float16"])
def test_names_that_are_taken_stay_theirs(taken: str, tmp_path: Path) -> None:
    text = f"g (float[n,3] x) => (float[n,3] y) {{ a = Mul (x, w)  {taken}p = Tanh (a)  y = Mul ({taken}p, {taken}) }}"
    w, other = sample(3), sample(3, seed=9)
    held: dict[str, Any] = {"w": w, taken: other}
    source = written(tmp_path / "m.onnx", text, **held)
    _, path = typed(source)
    x = sample(4, 3)
    before, after = outcome(source, x=x)["y"], outcome(path, x=x)["y"]
    assert np.abs(after - before).max() <= 8 * UNIT[BodyType.FP16] * max(np.abs(other).max(), np.abs(w).max(), 1) ** 2


def test_constants_beside_the_file_are_taken_along(tmp_path: Path) -> None:
    text = f"g (float[n,7] x) => (float[n,3] y) {{ {PAIR} e = Exp (p)  y = Mul (e, f) }}"
    codes = np.random.default_rng(1).integers(-127, 128, (7, 3)).astype(np.int8)
    held: dict[str, Any] = {"sx": np.float32(0.02), "sw": floats([0.002, 0.001, 0.003]), "zero": ZERO, "f": sample(3)}
    source = written(tmp_path / "m.onnx", text, codes=codes, **held)
    before = outcome(source, x=sample(4, 7))["y"]
    model = onnx.load(source)
    onnx.save(model, source, save_as_external_data=True, location="held.bin", size_threshold=0)
    assert (tmp_path / "held.bin").stat().st_size > 21
    _, path = typed(source)
    (tmp_path / "held.bin").unlink()
    after = outcome(path, x=sample(4, 7))["y"]
    assert np.abs(after / before - 1).max() < 0.02


@pytest.mark.parametrize("operator", ["Conv (x, w)", "MaxPool <kernel_shape=[2, 2]> (x)", "GlobalAveragePool (x)"])
def test_convolutions_and_pools_are_bfloat16(operator: str, tmp_path: Path) -> None:
    text = f"g (float[n,2,5,7] x) => (float[n,c,h,k] y) {{ t = Tanh (x)  p = {operator}  y = Tanh (p) }}"
    text = text.replace("(x, w)  y", "(t, w)  y").replace("(x)  y", "(t)  y")
    held: dict[str, Any] = {"w": sample(3, 2, 3, 3)} if "Conv" in operator else {}
    found, path = typed(written(tmp_path / "m.onnx", text, **held), BodyType.BF16)
    assert not found.wide
    assert makes(path)[f"p/{operator.split(maxsplit=1)[0]}"] == BRAIN
    write_widened(path, wide := tmp_path / "wide.onnx")
    x = sample(2, 2, 5, 7)
    before, after = outcome(tmp_path / "m.onnx", x=x)["y"], outcome(wide, x=x)["y"]
    # Eighteen products of numbers up to 1 and the weights; the sum's slope behind tanh is 1 at most.
    most = 4 * UNIT[BodyType.BF16] * (1 + np.abs(held["w"]).sum(axis=(1, 2, 3)).max() if held else 1)
    assert np.abs(after - before).max() <= most


def test_what_is_told_of_a_body() -> None:
    found = TypedBody(body=BodyType.FP16, nodes=3, usual={"Softmax": 2}, wide=(("blocks.0", "Mul", "values up to 9"),))
    assert found.as_dict() == {
        "type": "fp16",
        "nodes": 3,
        "usual_float32": {"Softmax": 2},
        "float32": [{"layer": "blocks.0", "operator": "Mul", "reason": "values up to 9"}],
    }
