"""Checks that must be able to fail: broken models, broken engines, nothing compared."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from normfuse.checks import Check, check_codes, check_export, check_fold, require, samples_in
from normfuse.errors import CheckFailed
from normfuse.export.onnx import export_onnx
from normfuse.export.placement import onnx_placement
from normfuse.graph import Graph, capture, query
from normfuse.graph.edit import converted, editing
from normfuse.kernels.ops import DEQUANTIZE, QUANTIZE
from normfuse.passes.insert_quantizers import InsertQuantizers
from normfuse.passes.place_quantizers import PlaceQuantizers
from normfuse.precision import round_all_to_nearest
from normfuse.quant.bits import Bits
from normfuse.quant.code_kinds import ActivationCodes
from normfuse.runtime import agreement
from normfuse.runtime.onnx_session import open_onnx
from normfuse.testing import randomized, seeded

SAMPLES = [[torch.randn(1, 5, generator=torch.Generator().manual_seed(seed))] for seed in range(3)]


class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 1, 15).reshape(3, 5))
        self.bias = nn.Parameter(torch.tensor([0.5, 0.0, -0.5]))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight, self.bias)


def linear(bias: float = 0.0) -> Graph:
    graph = capture(Head().eval(), [torch.zeros(2, 5)])
    (held,) = (query.constant(graph, node) for node in graph.nodes if node.target == "bias")
    with torch.no_grad():
        held[1] = bias  # after the capture, which refuses NaN
    return graph


def fold_check(broken: Graph, folder: Path, samples: list[list[Tensor]]) -> Check:
    return check_fold(linear(), converted(broken, torch.float64), samples)


def export_check(broken: Graph, folder: Path, samples: list[list[Tensor]]) -> Check:
    export_onnx(broken, folder / "model.onnx")
    return check_export(linear(), folder / "model.onnx", samples, threads=1)


def codes_check(broken: Graph, folder: Path, samples: list[list[Tensor]]) -> Check:
    export_onnx(broken, folder / "model.onnx")
    return check_codes(linear(), folder / "model.onnx", samples, threads=1, session_config={})[-1]


CheckOf = Callable[[Graph, Path, list[list[Tensor]]], Check]
EVERY = pytest.mark.parametrize("check", [fold_check, export_check, codes_check])


@EVERY
def test_what_is_the_same_holds(check: CheckOf, tmp_path: Path) -> None:
    found = check(linear(), tmp_path, SAMPLES)
    assert found.holds, found


@EVERY
@pytest.mark.parametrize("bias", [math.nan, math.inf, 3.0])
def test_outputs_that_differ_or_are_not_finite_fail(check: CheckOf, tmp_path: Path, bias: float) -> None:
    found = check(linear(bias), tmp_path, SAMPLES)
    assert not found.holds, found


@EVERY
def test_where_nothing_is_compared_nothing_holds(check: CheckOf, tmp_path: Path) -> None:
    assert not check(linear(), tmp_path, []).holds


def test_samples_are_counted_and_not_batches(tmp_path: Path) -> None:
    batches = [[torch.zeros(3, 5)], [torch.ones(3, 5)]]
    assert fold_check(linear(), tmp_path, batches).detail == "6 samples"
    assert fold_check(linear(), tmp_path, [[torch.zeros(1, 5)]]).detail == "1 sample"
    assert samples_in([[torch.zeros(()), torch.zeros(1, 4), torch.zeros(2, 4)]]) == 2


def quantized() -> Graph:
    graph = linear()
    reader = next(node for node in graph.nodes if node.op == "call_function")
    with editing(graph) as edit:
        (x,) = graph.inputs
        scale = edit.constant(torch.tensor(0.05), "scale")
        zero = edit.constant(torch.tensor(128, dtype=torch.uint8), "zero_point")
        codes = edit.call(QUANTIZE, x, scale, zero, -1, 0, 255, at=reader, name="x_codes")
        values = edit.call(DEQUANTIZE, codes, scale, zero, -1, at=reader, name="x_values")
        edit.set_argument(reader, 0, values)
    return graph


def test_codes_are_compared_by_name_and_a_quantizer_that_is_not_found_fails(tmp_path: Path) -> None:
    graph, path = quantized(), tmp_path / "model.onnx"
    export_onnx(graph, path)
    codes, outputs = check_codes(graph, path, SAMPLES, threads=1, session_config={})
    assert (codes.holds, outputs.holds) == (True, True)
    assert codes.detail == "1 tensors, 3 samples, at most 0.00% of a tensor's codes differ"

    renamed = onnx.load(path)
    for node in renamed.graph.node:
        for names in (node.input, node.output):
            names[:] = ["another" if name == "x_codes" else name for name in names]
    onnx.save(renamed, path)
    codes, outputs = check_codes(graph, path, SAMPLES, threads=1, session_config={})
    assert (codes.holds, outputs.holds) == (False, True)
    assert codes.detail.startswith("not found in the engine: x_codes; 0 tensors")


class Perceptron(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(32, 48), nn.Linear(48, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(nn.functional.gelu(self.a(x)))


VECTORS = [[torch.randn(3, 32, generator=seeded(seed))] for seed in range(3)]


def dynamic(path: Path) -> Graph:
    """Return two products that make the codes of their inputs, a float operator between them, and write the file."""
    graph = capture(randomized(Perceptron()).eval(), VECTORS[0])
    PlaceQuantizers(
        placement=onnx_placement("avx512_vnni", Bits.parse("w4a8"), activations=ActivationCodes.DYNAMIC)
    ).run(graph)
    decided = round_all_to_nearest(graph, {})
    InsertQuantizers(activations=decided.activations, weights=decided.weights).run(graph)
    export_onnx(graph, path)
    return graph


def failing(graph: Graph, path: Path) -> list[str]:
    return [check.name for check in check_codes(graph, path, VECTORS, threads=1, session_config={}) if not check.holds]


def test_products_that_make_codes_hold_and_say_what_was_compared(tmp_path: Path) -> None:
    graph = dynamic(path := tmp_path / "model.onnx")
    found = check_codes(graph, path, VECTORS, threads=1, session_config={})
    assert [check.name for check in found if check.holds] == [
        "engine's products = simulation's",
        "engine's floats between products = simulation's",
        "shipped file's outputs = simulation's",
        "engine's outputs = simulation's",
    ]
    assert all("2 products" in check.detail for check in found[:3])
    assert all("9 samples" in check.detail for check in found)


@pytest.mark.parametrize("other", [torch.ops.aten.tanh.default, torch.ops.aten.relu.default])
def test_another_float_operator_between_two_products_fails(other: Any, tmp_path: Path) -> None:
    graph = dynamic(path := tmp_path / "model.onnx")
    (between,) = [node for node in graph.nodes if node.target is torch.ops.aten.gelu.default]
    with editing(graph) as edit:
        edit.replace(between, other, between.args[0])
    assert failing(graph, path) == ["engine's floats between products = simulation's"]


def test_the_file_that_ships_is_run_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Should onnxruntime make something else of the file than of the copy that shows more, it must not pass."""
    graph = dynamic(path := tmp_path / "model.onnx")
    model = onnx.load(path)
    last = [node for node in model.graph.node if node.op_type == "MatMulNBits"][-1]
    (bias,) = [tensor for tensor in model.graph.initializer if tensor.name == last.input[5]]
    bias.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(bias) * 1.5, bias.name))
    onnx.save(model, another := tmp_path / "another.onnx")

    def opened(asked: Path, **options: Any) -> Any:
        return open_onnx(another if asked == path else asked, **options)

    monkeypatch.setattr(agreement, "open_onnx", opened)
    assert failing(graph, path) == ["shipped file's outputs = simulation's"]


def test_what_failed_is_told_with_its_figures() -> None:
    good, bad = Check("good", 0.5, 1.0, "2 samples"), Check("bad", math.nan, 1.0, "3 samples")
    require([good])
    with pytest.raises(CheckFailed, match="bad: nan \\(3 samples\\)") as caught:
        require([good, bad])
    assert "good" not in str(caught.value)
