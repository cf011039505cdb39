"""How far an engine's outputs are from the model's, and where nothing can be told."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from normfuse.checks import check_typed
from normfuse.export.onnx import export_onnx
from normfuse.export.placement import tensorrt_placement
from normfuse.graph import Graph, capture
from normfuse.passes.insert_quantizers import InsertQuantizers
from normfuse.passes.place_quantizers import PlaceQuantizers
from normfuse.precision import round_all_to_nearest
from normfuse.quant import Range
from normfuse.quant.bits import Bits
from normfuse.quant.target import BodyType, EightBits
from normfuse.runtime.agreement import Agreement, _steps_between, compare_codes, output_error
from normfuse.runtime.onnx_session import AS_WRITTEN
from normfuse.testing import Small, randomized

INF, NAN = math.inf, math.nan


def test_the_error_is_relative_to_the_largest_value_expected() -> None:
    assert output_error([[1.0, -4.0]], [[1.0, -5.0]]) == 0.2
    assert output_error(np.array([True, False]), np.array([True, True])) == 1.0
    assert output_error([0.0], [0.5]) == 1.0
    assert output_error([0.25], [0.0]) == 0.25, "nothing to be relative to"


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        pytest.param([1.0, NAN], [1.0, 2.0], id="not a number"),
        pytest.param([NAN, NAN], [NAN, NAN], id="not a number on both sides"),
        pytest.param([1.0, INF], [1.0, 2.0], id="infinite"),
        pytest.param([1.0, 2.0], [1.0, -INF], id="finite where infinite is expected"),
        pytest.param([1.0, INF], [1.0, -INF], id="another infinity"),
        pytest.param([1.0, NAN], [1.0, -INF], id="not a number where infinite is expected"),
        pytest.param([1.0], [1.0, 1.0], id="another shape"),
    ],
)
def test_what_cannot_be_compared_is_infinitely_far(found: list[float], expected: list[float]) -> None:
    assert output_error(found, expected) == INF


def test_the_same_infinity_is_no_difference_and_no_scale() -> None:
    assert output_error([-INF, 3.0], [-INF, 4.0]) == 0.25


SPREAD = torch.logspace(-8, 0, 24).repeat(3, 1) * torch.tensor([[1.0], [-0.9], [0.8]])
"""Eight decades of both signs, so that many codes are tiny and some are large."""


def float8_map(folder: Path) -> tuple[Graph, Path]:
    """Return a linear map of 8-bit floats that reads what tanh makes, and its file."""
    graph = capture(randomized(Small(lambda m, x: m.a(x.tanh()), a=nn.Linear(24, 5))), (SPREAD,))
    PlaceQuantizers(placement=tensorrt_placement(Bits(8, 8), EightBits.FP8)).run(graph)
    decided = round_all_to_nearest(graph, {"tanh": Range(-1.0, 1.0)})
    step = InsertQuantizers(activations=decided.activations, weights=decided.weights, biases_stay_float=True)
    assert step.run(graph).applied == {"activation": 1, "weight": 1}
    export_onnx(graph, folder / "m.onnx", standard=True)
    return graph, folder / "m.onnx"


def moved(path: Path, column: int, factor: float, shift: float = 0.0) -> Path:
    """Write a copy whose column of values in front of the quantizer is multiplied and shifted."""
    model = onnx.load(path)
    (place,) = [index for index, node in enumerate(model.graph.node) if node.op_type == "QuantizeLinear"]
    values = np.ones(24, np.float32)
    values[column] = factor
    added = np.zeros(24, np.float32)
    added[column] = shift
    for name, numbers in (("factors", values), ("shifts", added)):
        model.graph.initializer.append(onnx.numpy_helper.from_array(numbers, name))
    source = model.graph.node[place].input[0]
    model.graph.node[place].input[0] = "shifted"
    model.graph.node.insert(place, onnx.helper.make_node("Add", ["multiplied", "shifts"], ["shifted"]))
    model.graph.node.insert(place, onnx.helper.make_node("Mul", [source, "factors"], ["multiplied"]))
    onnx.save(model, path.with_name("moved.onnx"))
    return path.with_name("moved.onnx")


def compared(graph: Graph, path: Path) -> Agreement:
    return compare_codes(graph, path, [(SPREAD,)], session_config=AS_WRITTEN)


def test_codes_of_8_bit_floats_are_those_of_the_engine(tmp_path: Path) -> None:
    graph, path = float8_map(tmp_path)
    found = compared(graph, path)
    assert not found.missing
    (tensor,) = found.tensors
    assert (tensor.name, tensor.largest_difference, tensor.share_different) == ("tanh_codes", 0, 0.0)
    assert found.output_error < 24 * 2.0**-23, "sums of 24 floats"


@pytest.mark.parametrize("factor", [2.0, 0.5, -1.0])
def test_a_wrong_code_of_a_large_value_is_found(factor: float, tmp_path: Path) -> None:
    graph, path = float8_map(tmp_path)
    (tensor,) = compared(graph, moved(path, 23, factor)).tensors
    saturated = factor == 2.0  # 0.76 becomes 1 at most: then three codes are few
    assert tensor.largest_difference >= (3 if saturated else 8)
    assert tensor.share_different == pytest.approx(1 / 24)
    (codes, _) = check_typed(
        graph, tmp_path / "moved.onnx", [(SPREAD,)], BodyType.FP16, threads=1, session_config=AS_WRITTEN
    )
    assert (codes.bound, codes.holds) == (4.0, False)


def test_wrong_codes_near_zero_are_no_more_than_a_step(tmp_path: Path) -> None:
    graph, path = float8_map(tmp_path)
    (tensor,) = compared(graph, moved(path, 2, -30.0)).tensors
    assert tensor.largest_difference == 0, "below half of the smallest code both are zero"
    # 0.003 of a range of 1 is less than half a step of an int8, but tens of codes.
    (tensor,) = compared(graph, moved(path, 0, 0.0, 0.003)).tensors
    assert tensor.largest_difference == 1
    assert tensor.share_different == pytest.approx(1 / 24)


def test_behind_a_wrong_code_the_simulation_goes_on_with_the_engines(tmp_path: Path) -> None:
    graph, path = float8_map(tmp_path)
    found = compared(graph, moved(path, 23, 0.5))
    assert found.output_error < 24 * 2.0**-23


def test_what_is_no_number_on_one_side_is_found(tmp_path: Path) -> None:
    graph, path = float8_map(tmp_path)
    assert compared(graph, moved(path, 23, math.nan)).largest_difference > 100


def test_8_bit_floats_that_the_engine_does_not_show_are_missing(tmp_path: Path) -> None:
    graph, path = float8_map(tmp_path)
    model = onnx.load(path)
    for node in model.graph.node:
        for names in (node.input, node.output):
            for index, name in enumerate(names):
                names[index] = "other" if name == "tanh_codes" else name
    onnx.save(model, path)
    assert compared(graph, path).missing == ("tanh_codes",)


def test_steps_are_codes_of_large_values_and_parts_of_the_range_near_zero() -> None:
    def steps(found: list[float], expected: list[float]) -> list[int]:
        pair: list[Tensor] = [torch.tensor(each).to(torch.float8_e4m3fn) for each in (found, expected)]
        return [int(each) for each in _steps_between(*pair)]

    assert steps([448, 416, 448, 240], [448, 448, -448, 256]) == [0, 1, 252, 1]
    assert steps([1.0, 0.0, -0.0, 2.0**-9], [1.125, -0.0, 2.0**-9, -(2.0**-9)]) == [1, 0, 1, 1]
    assert steps([3.5, 3.5, 8.0], [-3.5, 0.0, 0.0]) == [2, 1, 3], "448 are 127 steps"
    assert steps([math.nan, math.nan, 448.0, 0.0], [math.nan, 448.0, math.nan, math.nan]) == [0, 252, 252, 252]
