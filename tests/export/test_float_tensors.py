"""The audit finds what is float, wherever it hides, and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from normfuse.checks import check_no_floats, require
from normfuse.errors import CheckFailed
from normfuse.export.float_tensors import float_tensors

FLOAT, INT8, BOOL = TensorProto.FLOAT, TensorProto.INT8, TensorProto.BOOL
OPSETS = [helper.make_opsetid("", 21), helper.make_opsetid("ours", 1)]
FLOATS = [
    TensorProto.FLOAT16,
    TensorProto.BFLOAT16,
    TensorProto.DOUBLE,
    TensorProto.FLOAT8E4M3FN,
    TensorProto.FLOAT8E5M2,
]


def constants() -> list[TensorProto]:
    held = {"scale": np.float32(0.1), "zero": np.int8(3), "table": np.arange(12, dtype=np.int8)}
    return [numpy_helper.from_array(np.asarray(value), name) for name, value in held.items()]


def write(
    path: Path,
    body: Sequence[onnx.NodeProto],
    *,
    inputs: Sequence[tuple[str, int]] = (),
    functions: Sequence[onnx.FunctionProto] = (),
    more: Sequence[TensorProto] = (),
) -> Path:
    """Write ``x -> codes -> body -> made -> y``; the body makes ``made`` of ``codes``."""
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["codes"]),
        *body,
        helper.make_node("DequantizeLinear", ["made", "scale", "zero"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "audited",
        [helper.make_tensor_value_info(name, kind, ["n", 4]) for name, kind in (("x", FLOAT), *inputs)],
        [helper.make_tensor_value_info(name, kind, ["n", 4]) for name, kind in (("y", FLOAT),)],
        [*constants(), *more],
    )
    model = helper.make_model(graph, opset_imports=OPSETS, ir_version=10, functions=list(functions))
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return path


def node(kind: str, read: str, made: str, **options: Any) -> onnx.NodeProto:
    return helper.make_node(kind, read.split(), [made], **options)


def through_float(read: str = "codes", made: str = "made", kind: int = FLOAT) -> list[onnx.NodeProto]:
    return [node("Cast", read, "wide", to=kind), node("Cast", "wide", made, to=INT8)]


def function(name: str, body: Sequence[onnx.NodeProto]) -> onnx.FunctionProto:
    return helper.make_function("ours", name, ["codes"], ["made"], body, OPSETS)


def test_between_the_ends_of_an_integer_network_nothing_is_float(tmp_path: Path) -> None:
    body = [node("Cast", "codes", "wide", to=TensorProto.INT64), node("Gather", "table wide", "made")]
    path = write(tmp_path / "m.onnx", body)
    assert float_tensors(path) == []
    check = check_no_floats(path)
    assert check.holds
    require([check])


def test_a_float_between_is_found_and_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "m.onnx", through_float())
    assert float_tensors(path) == ["wide"]
    with pytest.raises(CheckFailed, match="wide"):
        require([check_no_floats(path)])


@pytest.mark.parametrize("kind", FLOATS, ids=TensorProto.DataType.Name)
def test_every_type_of_floats_is_found(kind: int, tmp_path: Path) -> None:
    assert float_tensors(write(tmp_path / "m.onnx", through_float(kind=kind))) == ["wide"]


def test_quantizers_in_the_middle_are_found(tmp_path: Path) -> None:
    body = [node("DequantizeLinear", "codes scale zero", "value"), node("QuantizeLinear", "value scale zero", "made")]
    assert "value" in float_tensors(write(tmp_path / "m.onnx", body))


def test_a_float_in_a_function_is_found(tmp_path: Path) -> None:
    path = write(
        tmp_path / "m.onnx",
        [node("Hidden", "codes", "made", domain="ours")],
        functions=[function("Hidden", through_float())],
    )
    (found,) = float_tensors(path)
    assert "wide" in found


def test_a_float_in_a_function_of_a_function_is_found(tmp_path: Path) -> None:
    outer = function("Outer", [node("Inner", "codes", "made", domain="ours")])
    inner = function("Inner", through_float())
    path = write(tmp_path / "m.onnx", [node("Outer", "codes", "made", domain="ours")], functions=[outer, inner])
    (found,) = float_tensors(path)
    assert "wide" in found


def test_a_function_of_integers_has_none(tmp_path: Path) -> None:
    body = [node("Cast", "codes", "wide", to=TensorProto.INT64), node("Cast", "wide", "made", to=INT8)]
    path = write(
        tmp_path / "m.onnx", [node("Plain", "codes", "made", domain="ours")], functions=[function("Plain", body)]
    )
    assert float_tensors(path) == []


def test_an_input_that_is_read_as_it_is_counts(tmp_path: Path) -> None:
    body = [node("Cast", "x", "cast", to=INT8), node("Add", "codes cast", "made")]
    assert float_tensors(write(tmp_path / "m.onnx", body)) == ["x"]


def test_an_input_whose_size_is_read_does_not_count(tmp_path: Path) -> None:
    body = [node("Shape", "x", "size"), node("Reshape", "codes size", "made")]
    assert float_tensors(write(tmp_path / "m.onnx", body)) == []


def test_an_input_that_nothing_reads_does_not_count(tmp_path: Path) -> None:
    path = write(tmp_path / "m.onnx", [node("Identity", "codes", "made")], inputs=[("unread", FLOAT)])
    assert float_tensors(path) == []


def test_an_output_that_is_computed_in_float_counts(tmp_path: Path) -> None:
    path = write(tmp_path / "m.onnx", [node("Identity", "codes", "made")])
    model = onnx.load(path)
    model.graph.node.append(node("Relu", "y", "z"))
    model.graph.output.append(helper.make_tensor_value_info("z", FLOAT, ["n", 4]))
    onnx.save(model, path)
    assert "z" in float_tensors(path)


def test_the_same_output_twice_is_no_computation(tmp_path: Path) -> None:
    """The exporter joins outputs that are equal and writes Identity for the second."""
    path = write(tmp_path / "m.onnx", [node("Identity", "codes", "made")])
    model = onnx.load(path)
    model.graph.node.append(node("Identity", "y", "z"))
    model.graph.output.append(helper.make_tensor_value_info("z", FLOAT, ["n", 4]))
    onnx.save(model, path)
    assert float_tensors(path) == []


def test_a_float_constant_inside_counts(tmp_path: Path) -> None:
    held = numpy_helper.from_array(np.ones(4, dtype=np.float32), "factor")
    body = [node("Cast", "factor", "cast", to=INT8), node("Add", "codes cast", "made")]
    assert float_tensors(write(tmp_path / "m.onnx", body, more=[held])) == ["factor"]


def test_a_tensor_whose_type_nobody_knows_counts(tmp_path: Path) -> None:
    path = write(tmp_path / "m.onnx", [node("Identity", "codes", "made")])
    model = onnx.load(path)
    model.opset_import.append(helper.make_opsetid("theirs", 1))
    model.graph.node.insert(1, node("Unknown", "codes", "secret", domain="theirs"))
    onnx.save(model, path)
    assert float_tensors(path) == ["secret"]


def branch(name: str, *nodes: onnx.NodeProto, gives: str = "") -> onnx.GraphProto:
    value = helper.make_tensor_value_info(gives or nodes[-1].output[0], INT8, None)
    return helper.make_graph(list(nodes), name, [], [value])


def test_a_float_inside_a_branch_is_found(tmp_path: Path) -> None:
    """Both branches give codes; one of them goes through floats, in a branch of its own."""
    floats = branch(
        "floats",
        helper.make_node("DequantizeLinear", ["codes", "scale", "zero"], ["hidden"]),
        helper.make_node("QuantizeLinear", ["hidden", "scale", "zero"], ["back"]),
    )
    plain = branch("plain", helper.make_node("Identity", ["codes"], ["same"]))
    inner = helper.make_node("If", ["asked"], ["chosen"], then_branch=floats, else_branch=plain)
    again = branch("again", helper.make_node("Identity", ["codes"], ["again"]))
    outer = helper.make_node("If", ["asked"], ["made"], then_branch=branch("outer", inner), else_branch=again)
    asked = numpy_helper.from_array(np.array(True), "asked")
    assert float_tensors(write(tmp_path / "floats.onnx", [outer], more=[asked])) == ["hidden"]


def test_an_input_that_a_branch_reads_is_no_end(tmp_path: Path) -> None:
    quantized = branch("again", helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["again"]))
    plain = branch("plain", helper.make_node("Identity", ["codes"], ["same"]))
    chosen = helper.make_node("If", ["asked"], ["made"], then_branch=quantized, else_branch=plain)
    asked = numpy_helper.from_array(np.array(True), "asked")
    assert float_tensors(write(tmp_path / "floats.onnx", [chosen], more=[asked])) == ["x"]
