from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from normfuse.errors import BadInput
from normfuse.runtime.onnx_session import OnnxSession, open_onnx


def write_two_inputs(path: Path) -> Path:
    """y = a @ b + 1 with a [batch, 3] float, b [3, width] float; c [batch] int64 goes through."""
    one = onnx.numpy_helper.from_array(np.array(1.0, np.float32), "one")
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["a", "b"], ["product"]),
            helper.make_node("Add", ["product", "one"], ["y"]),
            helper.make_node("Identity", ["c"], ["d"]),
        ],
        "two",
        [
            helper.make_tensor_value_info("a", TensorProto.FLOAT, ["batch", 3]),
            helper.make_tensor_value_info("b", TensorProto.FLOAT, [3, None]),
            helper.make_tensor_value_info("c", TensorProto.INT64, ["batch"]),
        ],
        [
            helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", None]),
            helper.make_tensor_value_info("d", TensorProto.INT64, ["batch"]),
        ],
        [one],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.save(model, path)
    return path


@pytest.fixture
def session(tmp_path: Path) -> OnnxSession:
    return open_onnx(write_two_inputs(tmp_path / "two.onnx"), threads=1)


def feeds(batch: int = 5, width: int = 7) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    return {
        "a": generator.standard_normal((batch, 3)).astype(np.float32),
        "b": generator.standard_normal((3, width)).astype(np.float32),
        "c": np.arange(batch),
    }


def test_ports_tell_names_sizes_and_types(session: OnnxSession) -> None:
    assert [str(port) for port in session.inputs] == ["a: float32[batch, 3]", "b: float32[3, any]", "c: int64[batch]"]
    assert [port.shape for port in session.inputs] == [(None, 3), (3, None), (None,)]
    assert [port.name for port in session.outputs] == ["y", "d"]


def test_all_three_ways_to_call_compute_the_same(session: OnnxSession) -> None:
    given = feeds()
    expected = given["a"].astype(np.float64) @ given["b"].astype(np.float64) + 1
    by_name, by_position = session(**given), session(given["a"], given["b"], c=given["c"])
    # Three products and two sums of float32: a few roundings of values below 16.
    assert np.abs(session.run(given)["y"] - expected).max() <= 8 * np.finfo(np.float32).eps * np.abs(expected).max()
    for found in (by_name, by_position):
        assert np.array_equal(found["y"], session.run(given)["y"])
        assert np.array_equal(found["d"], given["c"])


def test_arrays_that_are_not_contiguous_run(session: OnnxSession) -> None:
    given = feeds(batch=4, width=6)
    strided = {**given, "b": np.repeat(given["b"], 2, axis=1)[:, ::2]}
    assert not strided["b"].flags.c_contiguous
    assert np.array_equal(session.run(strided)["y"], session.run(given)["y"])


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        pytest.param({"a": None}, "a, b", id="missing"),
        pytest.param({"z": np.zeros(3)}, "a, b, c, z", id="unknown"),
        pytest.param({"a": np.zeros((5, 3))}, "float64[5, 3]", id="type"),
        pytest.param({"a": np.zeros((5, 3), ">f4")}, ">f4[5, 3]", id="byte order"),
        pytest.param({"a": np.zeros((5, 4), np.float32)}, "float32[5, 4]", id="size"),
        pytest.param({"a": np.zeros(3, np.float32)}, "float32[3]", id="rank"),
        pytest.param({"c": np.arange(4)}, "int64[4]", id="one name, two sizes"),
        pytest.param({"c": [1, 2, 3, 4, 5]}, "a list", id="no array"),
    ],
)
def test_wrong_inputs_are_refused_with_what_was_expected(
    session: OnnxSession, changed: dict[str, object], says: str
) -> None:
    given: dict[str, object] = {**feeds(), **changed}
    wanted = {name: value for name, value in given.items() if value is not None}
    if "a" in changed and changed["a"] is None:
        says = "b, c"
    with pytest.raises(BadInput) as caught:
        session.run(wanted)  # type: ignore[arg-type]  # wrong on purpose
    assert says in caught.value.what
    assert caught.value.where == "two.onnx"
    assert "float32[" in caught.value.expected or "int64[" in caught.value.expected


def test_too_many_arrays_and_arrays_given_twice_are_refused(session: OnnxSession) -> None:
    given = feeds()
    with pytest.raises(BadInput, match="4 arrays by position"):
        session(*given.values(), given["a"])
    with pytest.raises(BadInput, match="a by name too"):
        session(given["a"], **given)


def test_a_failure_inside_the_model_is_bad_input(tmp_path: Path) -> None:
    # Sizes that no declaration forbids: 5 values do not reshape to [2, 3].
    shape = onnx.numpy_helper.from_array(np.array([2, 3]), "shape")
    graph = helper.make_graph(
        [helper.make_node("Reshape", ["x", "shape"], ["y"])],
        "reshape",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 3])],
        [shape],
    )
    path = tmp_path / "reshape.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)
    session = open_onnx(path, threads=1)
    assert session(x=np.arange(6, dtype=np.float32))["y"].shape == (2, 3)
    with pytest.raises(BadInput, match="onnxruntime failed on these inputs"):
        session(x=np.arange(5, dtype=np.float32))


def test_missing_and_broken_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no such model"):
        open_onnx(tmp_path / "none.onnx")
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"this is no model")
    with pytest.raises(BadInput, match="cannot open the model"):
        open_onnx(broken)


def test_session_entries_that_write_files_are_refused(tmp_path: Path) -> None:
    path, written = write_two_inputs(tmp_path / "two.onnx"), tmp_path / "written.onnx"
    with pytest.raises(BadInput, match=r"session\.optimized_model_filepath"):
        open_onnx(path, session_config={"session.optimized_model_filepath": str(written)})
    assert not written.exists()


def write_saturating(path: Path) -> Path:
    """A quantized product whose pairs of 8-bit products exceed 16 bits: 255 * 127 * 2 = 64770 > 32767."""
    constants = {
        "scale_x": np.float32(1.0),
        "zero_x": np.uint8(0),
        "w": np.full((64, 32), 127, np.int8),
        "scale_w": np.ones(32, np.float32),
        "zero_w": np.zeros(32, np.int8),
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale_x", "zero_x"], ["xq"]),
        helper.make_node("DequantizeLinear", ["xq", "scale_x", "zero_x"], ["xd"]),
        helper.make_node("DequantizeLinear", ["w", "scale_w", "zero_w"], ["wd"], axis=1),
        helper.make_node("MatMul", ["xd", "wd"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "saturating",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 64])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 32])],
        [onnx.numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)
    return path


def test_x64quantprecision_is_accepted_and_gives_exact_sums(tmp_path: Path) -> None:
    path = write_saturating(tmp_path / "saturating.onnx")
    session = open_onnx(path, threads=1, session_config={"session.x64quantprecision": "1"})
    found = session(np.full((3, 64), 255, np.float32))["y"]
    # 64 products of 255 * 127 = 2,072,640: below 2^24, so float32 holds the sum exactly.
    assert np.array_equal(found, np.full((3, 32), 64 * 255 * 127, np.float32))
