"""What calibration rarely meets: nothing varies, nothing is left, one sample is far off, or there is only one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from normfuse.build import FOLDING, check_quantized, write_quantized
from normfuse.errors import BadInput
from normfuse.export.placement import onnx_placement
from normfuse.graph import Graph, capture
from normfuse.planning import plan_quantization
from normfuse.progress import Silent
from normfuse.recipe import Recipe
from normfuse.testing import randomized, seeded

FEATURES, HIDDEN, CLASSES = 12, 20, 6

Change = Callable[[nn.Sequential, Tensor], None]
"""Makes a model and its samples degenerate, in place."""


def network() -> nn.Sequential:
    return randomized(nn.Sequential(nn.Linear(FEATURES, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, CLASSES)))  # type: ignore[return-value]


def samples(count: int, seed: int = 1) -> Tensor:
    return torch.randn(count, FEATURES, generator=seeded(seed))


def nothing(model: nn.Sequential, x: Tensor) -> None:
    """All as it was."""


def constant_channel(model: nn.Sequential, x: Tensor) -> None:
    x[:, 3] = 0.7


def constant_input(model: nn.Sequential, x: Tensor) -> None:
    x[:] = -0.4


def zero_input(model: nn.Sequential, x: Tensor) -> None:
    x[:] = 0.0


def dead_relu(model: nn.Sequential, x: Tensor) -> None:
    _bias(model, 0).fill_(-1e3)


def zero_weights(model: nn.Sequential, x: Tensor) -> None:
    _weight(model, 2).zero_()


def zero_output_channel(model: nn.Sequential, x: Tensor) -> None:
    _weight(model, 0)[5] = 0.0
    _weight(model, 2)[2] = 0.0


CHANGES: list[Change] = [
    nothing,
    constant_channel,
    constant_input,
    zero_input,
    dead_relu,
    zero_weights,
    zero_output_channel,
]
BOUNDS = {"8": 0.05, "w4a8": 0.3, "w4a4": 0.6, "w2a8": 1.0, "w3a16": 0.5}
"""The largest root of the relative squared error at each width; zero outputs must stay zero to that share of one."""


def quantized(model: nn.Module, x: Tensor, bits: str, effort: int) -> tuple[Graph, Graph]:
    graph = _folded(model)
    plan = plan_quantization(
        graph,
        lambda: ([sample[None]] for sample in x),
        recipe=Recipe(bits=bits, effort=effort),
        placement=onnx_placement("avx512_vnni", Recipe(bits=bits).precision),
        total=len(x),
        progress=Silent(),
    )
    return graph, plan.simulated()[0]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("effort", [0, 1, 2])
@pytest.mark.parametrize("bits", ["8", "w4a8", "w4a4"])
def test_degenerate_data_is_quantized_as_well_as_any(bits: str, effort: int, change: Change) -> None:
    model, x = network(), samples(24)
    with torch.no_grad():
        change(model, x)
    graph, found = quantized(model, x, bits, effort)
    assert _error(found.run(x)[0], graph.run(x)[0]) < BOUNDS[bits]


@pytest.mark.parametrize("change", [zero_weights, zero_output_channel])
@pytest.mark.parametrize("bits", ["w2a8", "w3a16"])
def test_zero_weights_at_few_bits(bits: str, change: Change) -> None:
    model, x = network(), samples(24)
    with torch.no_grad():
        change(model, x)
    graph, found = quantized(model, x, bits, 1)
    zeros = (_weight(model, 2) == 0).all(1)
    assert zeros.any()
    torch.testing.assert_close(found.run(x)[0][:, zeros], graph.run(x)[0][:, zeros], rtol=1e-3, atol=1e-3)
    assert _error(found.run(x)[0], graph.run(x)[0]) < BOUNDS[bits]


@pytest.mark.parametrize("change", CHANGES)
def test_the_engine_computes_degenerate_models_as_simulated(change: Change, tmp_path: Path) -> None:
    model, x = network(), samples(24)
    with torch.no_grad():
        change(model, x)
    placement = onnx_placement("avx512_vnni")

    def rows() -> Iterator[list[Tensor]]:
        return iter([[sample[None]] for sample in x])

    plan = plan_quantization(
        _folded(model), rows, recipe=Recipe(bits=8), placement=placement, total=len(x), progress=Silent()
    )
    engine = write_quantized(plan, tmp_path / "model.onnx", placement=placement)
    engine = check_quantized(engine, rows, threads=1)
    assert [check.name for check in engine.checks if not check.holds] == []


@pytest.mark.parametrize("effort", [0, 1, 2])
@pytest.mark.parametrize("bits", ["8", "w4a8", "w4a4"])
def test_one_sample_is_enough_at_every_effort(bits: str, effort: int) -> None:
    graph, found = quantized(network(), samples(1), bits, effort)
    x = samples(1)
    assert _error(found.run(x)[0], graph.run(x)[0]) < 1.5 * BOUNDS[bits]


@pytest.mark.parametrize("effort", [0, 1, 2])
@pytest.mark.parametrize("bits", ["8", "w4a8", "w4a4"])
def test_a_sample_a_thousand_times_larger_leaves_numbers(bits: str, effort: int) -> None:
    x = samples(24)
    x[7] *= 1000
    graph, found = quantized(network(), x, bits, effort)
    # The far sample takes the codes: what is asked is that it is computed well itself and that all stays finite.
    assert found.run(x)[0].isfinite().all()
    assert _error(found.run(x[7:8])[0], graph.run(x[7:8])[0]) < BOUNDS[bits]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("effort", [0, 2])
def test_a_sample_that_is_no_number_is_named(effort: int, value: float) -> None:
    x = samples(5)
    x[3, 2] = value
    with pytest.raises(BadInput, match="not finite") as caught:
        quantized(network(), x, "8", effort)
    assert "calibration sample 3" in str(caught.value)
    assert "input" in str(caught.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_sample_that_is_no_number_is_refused_where_only_weights_are_codes(value: float) -> None:
    x = samples(40)
    x[33, 2] = value
    with pytest.raises(BadInput, match="not finite") as caught:
        quantized(network(), x, "w4a16", 1)
    assert "calibration sample 33" in str(caught.value)


@pytest.mark.parametrize(("bits", "effort"), [("8", 0), ("8", 2), ("w4a4", 1), ("w4a16", 1), ("w4a16", 2)])
def test_no_samples_is_said(bits: str, effort: int) -> None:
    with pytest.raises(BadInput, match="no calibration samples"):
        quantized(network(), samples(0), bits, effort)


def _folded(model: nn.Module) -> Graph:
    graph = capture(model.eval(), (samples(2),))
    FOLDING.run(graph)
    return graph


def _weight(model: nn.Sequential, index: int) -> Tensor:
    weight = model[index].weight
    assert isinstance(weight, Tensor)
    return weight


def _bias(model: nn.Sequential, index: int) -> Tensor:
    bias = model[index].bias
    assert isinstance(bias, Tensor)
    return bias


def _error(found: Tensor, wanted: Tensor) -> float:
    """Return the root of the relative squared error."""
    return float((found - wanted).norm() / wanted.norm())
