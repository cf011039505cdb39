"""What has no integer form stays float between codes where that is allowed, and is listed; the rest is bits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from integer_module import build, hold, lower, module, normal
from test_refusals import ANSWERS, STEPS, Step
from torch import Tensor, nn

from normfuse.errors import UnsupportedModel
from normfuse.export.float_tensors import float_tensors
from normfuse.recipe import Recipe
from normfuse.report import Reason
from normfuse.runtime.onnx_session import open_onnx

ALLOWED = Recipe(integer_only=True, allow_float_islands=True)


def around(step: nn.Module, *, ends: bool = False) -> nn.Module:
    """A step between two linear maps, or at the end."""

    def forward(m: Any, x: Tensor) -> Tensor:
        found = m.step(m.map(x))
        found = found[0] if isinstance(found, tuple) else found
        return found if ends else m.last(found.flatten(1)[:, :6])

    return module(forward, map=nn.Linear(7, 6), step=step, last=nn.Linear(6, 3))


@pytest.mark.parametrize("name", STEPS)
def test_an_island_reads_and_writes_codes(name: str) -> None:
    """Every operator, those of the island among them, is half a code from the exact number, by the codes it reads."""
    lowered = lower(around(STEPS[name]), (4, 7), is_written=False, recipe=ALLOWED)
    assert "int_linear" in lowered.operators
    hold(lowered, (4, 7), count=3)


@pytest.mark.parametrize("name", STEPS)
def test_an_island_at_the_end(name: str, tmp_path: Path) -> None:
    engine = build(around(STEPS[name], ends=True), normal(4, 4, 7), path=tmp_path / "integers.onnx", recipe=ALLOWED)
    assert all(check.holds for check in engine.checks)
    left = [refusal for report in engine.passes for refusal in report.refused]
    assert left
    assert {refusal.layer for refusal in left} == {"step"}
    assert {refusal.reason for refusal in left} == {Reason.NO_INTEGER_FORM}
    assert float_tensors(tmp_path / "integers.onnx")


@pytest.mark.parametrize("function", ANSWERS.values(), ids=ANSWERS)
def test_answers_of_floats(function: Callable[[Tensor], Tensor], tmp_path: Path) -> None:
    """A comparison or an order is that of the values that codes stand for."""
    network = module(lambda m, x: (m.step(m.map(x)), m.map(x)), map=nn.Linear(7, 6), step=Step(function))
    engine = build(network, normal(4, 7), path=tmp_path / "integers.onnx", recipe=ALLOWED)
    x = normal(5, 7, seed=3)
    answer, values = engine.graph.run(x)
    assert torch.equal(answer, function(values))
    session = open_onnx(tmp_path / "integers.onnx", threads=1)
    made = session.run({engine.graph.input_names[0]: x.numpy()})
    assert np.array_equal(made[engine.graph.output_names[0]], answer.numpy())


def test_neighbours_are_one_island(tmp_path: Path) -> None:
    """Nothing is rounded between two floats: one quantizer for the input, one behind the island."""
    network = around(Step(lambda x: x.cumsum(1).sort(-1)[0].cumsum(1)))
    build(network, normal(4, 4, 7), path=tmp_path / "integers.onnx", recipe=ALLOWED)
    nodes = [node.op_type for node in onnx.load(tmp_path / "integers.onnx").graph.node]
    assert nodes.count("QuantizeLinear") == 2
    assert nodes.count("DequantizeLinear") == 2


def test_what_an_integer_operator_reads_beside_an_island_stays_codes(tmp_path: Path) -> None:
    network = module(
        lambda m, x: m.last(m.step(m.map(x)) + m.map(x)),
        map=nn.Linear(7, 6),
        step=Step(lambda x: x.cumsum(1)),
        last=nn.Linear(6, 3),
    )
    lowered = lower(network, (4, 7), is_written=False, recipe=ALLOWED)
    assert "int_linear_add" in lowered.operators
    hold(lowered, (4, 7))


def test_a_model_that_needs_no_island_is_the_same_with_them_allowed(tmp_path: Path) -> None:
    network, samples = module(lambda m, x: m.map(x).relu(), map=nn.Linear(7, 6)), normal(4, 7)
    plain = build(network, samples, path=tmp_path / "plain.onnx")
    allowed = build(network, samples, path=tmp_path / "allowed.onnx", recipe=ALLOWED)
    assert (tmp_path / "plain.onnx").read_bytes() == (tmp_path / "allowed.onnx").read_bytes()
    assert [check.name for check in plain.checks] == [check.name for check in allowed.checks]


def test_the_refusal_names_the_option(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel) as refusal:
        build(around(STEPS["sort"]), normal(4, 4, 7), path=tmp_path / "integers.onnx")
    assert "--allow-float-islands" in refusal.value.hint
    assert "sort" in refusal.value.what


PRODUCTS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "transposed, one axis": (nn.ConvTranspose1d(2, 3, 2, 2), (2, 5)),
    "transposed": (nn.ConvTranspose2d(2, 3, 2, 2), (2, 5, 6)),
    "three axes": (nn.Conv3d(2, 3, 3), (2, 4, 5, 6)),
    "with a bound": (nn.Sequential(nn.ConvTranspose2d(2, 3, 2, 2), nn.ReLU()), (2, 5, 6)),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_weights_of_an_island_stay_float(name: str) -> None:
    """onnxruntime makes 8-bit weights of a float product between codes, if it is let."""
    step, shape = PRODUCTS[name]
    hold(lower(module(lambda m, x: m.step(x), step=step), shape, recipe=ALLOWED), shape)


def test_weights_of_an_island_in_front_of_integers_stay_float() -> None:
    network = module(lambda m, x: m.last(m.step(x)), step=nn.ConvTranspose2d(2, 3, 2, 2), last=nn.Conv2d(3, 2, 1))
    hold(lower(network, (2, 5, 6), recipe=ALLOWED), (2, 5, 6))
