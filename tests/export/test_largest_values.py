"""How large the floats of a file become, against numpy's own maxima."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from float_files import floats, sample, written

from normfuse.export.largest_values import largest_values

INF, NAN = np.inf, np.nan


def magnitudes(values: Any) -> float:
    return float(np.abs(values).max())


def test_every_float_tensor_has_the_maximum_of_its_magnitudes(tmp_path: Path) -> None:
    text = """g (float[n,7] x, int64[n] i, float[n,1] f) => (float[n,3] y, int64[n] k)
    { a = Mul (x, f)  p = MatMul (a, w)  y = Relu (p)  k = Add (i, i)  s = Shape (x) }"""
    w = sample(7, 3)
    path = written(tmp_path / "m.onnx", text, w=w)
    samples = [
        {"x": sample(n, 7, seed=n), "i": np.full(n, 10**6), "f": sample(n, 1, seed=9 + n, size=n)} for n in (5, 2, 3)
    ]
    found = largest_values(path, iter(samples))
    products = [each["x"] * each["f"] for each in samples]
    wanted: dict[str, list[Any]] = {
        "x": [each["x"] for each in samples],
        "f": [each["f"] for each in samples],
        "a": products,
        "p": [each @ w for each in products],
        "y": [np.maximum(each @ w, 0) for each in products],
    }
    assert set(found) == set(wanted), "neither integers nor constants"
    for name, values in wanted.items():
        assert found[name] == pytest.approx(max(map(magnitudes, values)), rel=1e-6)


def test_the_largest_may_be_negative_and_in_any_sample(tmp_path: Path) -> None:
    path = written(tmp_path / "m.onnx", "g (float[3] x) => (float[3] y) { y = Neg (x) }")
    for values in ([[1, -9, 2], [3, 4, 5]], [[3, 4, 5], [-9, 1, 1]], [[0, 0, 0], [0, 0, -9]]):
        found = largest_values(path, [{"x": floats(each)} for each in values])
        assert found == {"x": 9.0, "y": 9.0}


@pytest.mark.parametrize("odd", [NAN, INF, -INF])
@pytest.mark.parametrize("place", range(4))
@pytest.mark.parametrize("length", [4, 37])
def test_what_is_not_finite_hides_nothing_and_is_no_magnitude(
    odd: float, place: int, length: int, tmp_path: Path
) -> None:
    path = written(tmp_path / "m.onnx", "g (float[n] x) => (float[n] y) { y = Neg (x) }")
    x = np.linspace(-2.5, 2, length, dtype=np.float32)
    x[place] = 7.5
    with_odd = np.insert(x, place + (place % 2), odd)
    assert largest_values(path, [{"x": with_odd}]) == {"x": 7.5, "y": 7.5}
    assert largest_values(path, [{"x": x}, {"x": np.full(3, odd, np.float32)}]) == {"x": 7.5, "y": 7.5}


def test_nothing_but_what_is_not_finite_has_no_magnitude(tmp_path: Path) -> None:
    path = written(tmp_path / "m.onnx", "g (float[n] x) => (float[n] y) { y = Neg (x) }")
    assert largest_values(path, [{"x": floats([NAN, -INF, INF])}]) == {"x": 0.0, "y": 0.0}
    assert largest_values(path, [{"x": floats([-0.0])}]) == {"x": 0.0, "y": 0.0}
    assert largest_values(path, [{"x": floats([-3.4028235e38])}])["y"] == np.finfo(np.float32).max


def test_tensors_without_elements_have_no_magnitude(tmp_path: Path) -> None:
    text = "g (float[n,3] x) => (float[m,3] y, float[n,3] z) { y = Slice (x, from, to)  z = Neg (x) }"
    held: dict[str, Any] = {"from": np.array([1]), "to": np.array([99])}
    path = written(tmp_path / "m.onnx", text, **held)
    found = largest_values(path, [{"x": floats([[1, 2, 3]])}, {"x": np.zeros((0, 3), np.float32)}])
    assert found == {"x": 3.0, "y": 0.0, "z": 3.0}
    assert largest_values(path, [{"x": floats([[1, 2, 3], [4, -5, 6]])}])["y"] == 6.0


def test_no_samples_show_nothing(tmp_path: Path) -> None:
    path = written(tmp_path / "m.onnx", "g (float[n] x) => (float[n] y) { y = Neg (x) }")
    assert largest_values(path, []) == {"x": 0.0, "y": 0.0}


def test_samples_are_read_one_by_one(tmp_path: Path) -> None:
    path = written(tmp_path / "m.onnx", "g (float[n] x) => (float[n] y) { y = Neg (x) }")
    held = np.zeros(2, np.float32)

    def samples() -> Iterator[dict[str, Any]]:
        for size in (1, 4, 2):
            held[:] = size
            yield {"x": held}

    assert largest_values(path, samples()) == {"x": 4.0, "y": 4.0}


def test_values_of_codes_are_those_of_the_file(tmp_path: Path) -> None:
    text = """g (float[n,3] x) => (float[n,2] y)
    { c = QuantizeLinear (x, s, zero)  v = DequantizeLinear (c, s, zero)
      w = DequantizeLinear <axis=1> (codes, sw)  y = MatMul (v, w) }"""
    codes = np.array([[127, -3], [4, 100], [-6, 7]], np.int8)
    path = written(tmp_path / "m.onnx", text, s=np.float32(0.5), zero=np.int8(0), codes=codes, sw=floats([2, 3]))
    x = floats([[1.2, -3.4, 99.0]])
    found = largest_values(path, [{"x": x}])
    values = np.clip(np.round(x * 2), -128, 127) / 2
    assert found == {
        "x": 99.0,
        "v": 63.5,
        "w": 300.0,
        "y": pytest.approx(magnitudes(values @ (codes * floats([2, 3])))),
    }


def test_the_file_stays_as_it_is_and_may_have_its_constants_beside_it(tmp_path: Path) -> None:
    path = written(tmp_path / "m.onnx", "g (float[n,7] x) => (float[n,3] y) { y = MatMul (x, w) }", w=sample(7, 3))
    onnx.save(onnx.load(path), path, save_as_external_data=True, location="held.bin", size_threshold=0)
    before = path.read_bytes()
    x = sample(2, 7)
    assert largest_values(path, [{"x": x}])["y"] == pytest.approx(magnitudes(x @ sample(7, 3)), rel=1e-6)
    assert path.read_bytes() == before
    assert sorted(each.name for each in tmp_path.iterdir()) == ["held.bin", "m.onnx"]
