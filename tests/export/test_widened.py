"""A float32 copy of a file in a narrow type computes what the type would, to the last bit of every result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from normfuse.export.body import write_body
from normfuse.export.narrow_numbers import NUMBERS
from normfuse.export.widened import is_bfloat16, write_widened
from normfuse.quant.target import BodyType
from normfuse.runtime.onnx_session import open_onnx
from tests.export.float_files import floats, sample, written

BODIES = [BodyType.FP16, BodyType.BF16]

SUM = "g (float[n] x, float[n] z) => (float[n] y) { y = Add (x, z) }"


def session(text: str, body: BodyType, folder: Path, *, rounds: bool = True, **constants: Any) -> Any:
    exact = written(folder / "exact.onnx", text, **constants)
    write_body(exact, folder / "typed.onnx", body, {})
    write_widened(folder / "typed.onnx", folder / "copy.onnx", rounds=rounds)
    return open_onnx(folder / "copy.onnx")


def narrowed(values: Any, body: BodyType) -> Any:
    with np.errstate(over="ignore"):
        return values.astype(NUMBERS[body].numpy)


def sums(x: Any, z: Any, body: BodyType) -> Any:
    """Return what hardware of the type computes: both read in the type, their sum rounded once."""
    with np.errstate(over="ignore", invalid="ignore"):
        exact = narrowed(x, body).astype(np.float64) + narrowed(z, body).astype(np.float64)
        return narrowed(exact.astype(np.float32), body).astype(np.float32)


@pytest.fixture(scope="module", params=BODIES, ids=[body.value for body in BODIES])
def adder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[BodyType, Any]:
    return request.param, session(SUM, request.param, tmp_path_factory.mktemp("adder"))


def equal(found: Any, expected: Any) -> None:
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(np.signbit(found[found == 0]), np.signbit(expected[found == 0]))


def test_every_number_of_the_type_and_what_lies_between(adder: tuple[BodyType, Any]) -> None:
    """All 65,536 of them, each with half a step and a little more or less added: ties go to the even one."""
    body, add = adder
    every = np.arange(1 << 16, dtype=np.uint16).view(NUMBERS[body].numpy).astype(np.float32)
    every = every[np.isfinite(every)]
    for fraction in (0.0, 0.25, 0.5, 0.75, -0.5):
        with np.errstate(over="ignore", invalid="ignore"):
            step = np.spacing(np.abs(every).astype(NUMBERS[body].numpy)).astype(np.float32) * np.float32(fraction)
        step = np.where(np.isfinite(step), step, 0).astype(np.float32)
        x = (every + step).astype(np.float32)
        zeros = np.zeros_like(x)
        np.testing.assert_array_equal(add(x, zeros)["y"], sums(x, zeros, body))


def test_the_ends(adder: tuple[BodyType, Any]) -> None:
    body, add = adder
    numbers = NUMBERS[body]
    most, least = numbers.largest, float(np.spacing(numbers.numpy.type(0)))
    x = floats([most, most, -most, 0.0, -0.0, np.inf, -np.inf, np.inf, np.nan, least, least, 1e-45])
    z = floats([most, 1.0, -most, 0.0, -0.0, 1.0, 1.0, -np.inf, 1.0, least, -least, 0.0])
    np.testing.assert_array_equal(add(x, z)["y"], sums(x, z, body))


@given(st.lists(st.tuples(*[st.floats(width=32)] * 2), min_size=1, max_size=40))
def test_any_sums(adder: tuple[BodyType, Any], pairs: list[tuple[float, float]]) -> None:
    body, add = adder
    x, z = floats([pair[0] for pair in pairs]), floats([pair[1] for pair in pairs])
    np.testing.assert_array_equal(add(x, z)["y"], sums(x, z, body))


def test_without_rounding_only_constants_are_of_the_type(tmp_path: Path) -> None:
    x, w = sample(7), sample(7, seed=1)
    text = "g (float[7] x) => (float[7] y) { y = Add (x, w) }"
    found = session(text, BodyType.BF16, tmp_path, rounds=False, w=w)(x)["y"]
    np.testing.assert_array_equal(found, x + narrowed(w, BodyType.BF16).astype(np.float32))


def test_an_overflow_is_shown(tmp_path: Path) -> None:
    """Onnxruntime computes float16 in float32 where it can, and would give the inputs back."""
    text = "g (float[2] x) => (float[2] y) { d = Mul (x, two) y = Mul (d, half) }"
    run = session(text, BodyType.FP16, tmp_path, two=floats(2.0), half=floats(0.5))
    np.testing.assert_array_equal(run(floats([60000.0, 2049.0]))["y"], floats([np.inf, 2048.0]))


@pytest.mark.parametrize(
    "text",
    [
        "g (float[n,3] x) => (float[n,3] y) { v = ReduceMean <keepdims=1> (x, last) e = Add (v, tiny) s = Sqrt (e) "
        "y = Div (x, s) }",
        "g (float[n,3] x) => (float[n,3] y) { v = ReduceL2 <keepdims=1> (x, last) e = Max (v, tiny) y = Div (x, e) }",
    ],
    ids=["root", "largest"],
)
def test_guards_against_zero_hold_in_float16(text: str, tmp_path: Path) -> None:
    """A guard of 1e-12 is 0 in float16: what divides by it must not read it as such."""
    run = session(text, BodyType.FP16, tmp_path, tiny=floats(1e-12), last=np.array([-1], dtype=np.int64))
    assert np.isfinite(run(np.zeros((2, 3), dtype=np.float32))["y"]).all()


def test_bfloat16_is_told_by_constants_or_casts_alone(tmp_path: Path) -> None:
    for body in BODIES:
        exact = written(tmp_path / "exact.onnx", SUM)
        write_body(exact, tmp_path / f"{body.value}.onnx", body, {})
        assert is_bfloat16(tmp_path / f"{body.value}.onnx") is (body is BodyType.BF16)


@pytest.mark.parametrize("data", [b"", b"no model"])
def test_what_is_no_onnx_file_is_not_of_bfloat16(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(data)
    assert not is_bfloat16(tmp_path / "m.onnx")
    assert not is_bfloat16(tmp_path / "nothing.onnx")
