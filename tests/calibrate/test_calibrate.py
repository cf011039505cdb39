"""Calibration: exact, independent of batching and order, and it picks by local output error."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from torch import Tensor, nn

from normfuse.calibration import calibrate
from normfuse.errors import BadInput
from normfuse.export.placement import X86_VNNI
from normfuse.graph import Graph, capture
from normfuse.passes.place_quantizers import PlaceQuantizers
from normfuse.passes.presets import CANONICAL, FOLD, LOWER
from normfuse.pipeline import Pipeline
from normfuse.quant import UINT8, asymmetric, quantize_dequantize
from normfuse.recipe import CalibrationMethod


def placed(model: nn.Module, example: Tensor) -> Graph:
    graph = capture(model.eval(), [example])
    Pipeline(phases=(CANONICAL, FOLD, LOWER)).run(graph)
    PlaceQuantizers(placement=X86_VNNI).run(graph)
    return graph


def source(samples: Tensor) -> Callable[[], Iterator[Sequence[Tensor]]]:
    return lambda: ([sample[None]] for sample in samples)


def two_layers() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(11, 17), nn.GELU(), nn.Linear(17, 5))


@pytest.mark.parametrize("method", list(CalibrationMethod))
def test_the_order_of_samples_does_not_matter(method: CalibrationMethod) -> None:
    samples = torch.randn(23, 11, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.1, 9, 23)[:, None]
    graph = placed(two_layers(), samples[:2])
    order = torch.randperm(23, generator=torch.Generator().manual_seed(1))
    assert calibrate(graph, source(samples), method=method) == calibrate(graph, source(samples[order]), method=method)


def test_min_max_is_what_was_observed() -> None:
    samples = torch.randn(9, 11, generator=torch.Generator().manual_seed(4))
    graph = placed(two_layers(), samples[:2])
    found = calibrate(graph, source(samples), method=CalibrationMethod.MIN_MAX)
    (image,) = [node.name for node in graph.inputs]
    assert found.chosen[image].range.minimum == float(samples.min())
    assert found.chosen[image].range.maximum == float(samples.max())
    assert found.samples == 9


def test_the_competition_is_won_by_the_least_error_at_the_readers_output() -> None:
    # One far outlier in a feature that the layer ignores: min-max wastes its codes on it.
    samples = torch.randn(400, 11, generator=torch.Generator().manual_seed(5))
    samples[7, 0] = 400.0
    layer = nn.Linear(11, 6)
    with torch.no_grad():
        layer.weight[:, 0] = 0.0
    graph = placed(layer, samples[:2])
    (image,) = [node.name for node in graph.inputs]
    found = calibrate(graph, source(samples)).chosen[image]

    def error(low: float, high: float) -> float:
        wrong = quantize_dequantize(samples, asymmetric(low, high, UINT8)) - samples
        return float((wrong @ layer.weight.detach().mT).double().square().sum())

    assert found.method != "min-max"
    assert error(found.range.minimum, found.range.maximum) < 0.2 * error(float(samples.min()), float(samples.max()))
    assert min(found.errors.values()) == found.errors[found.method] == 1.0


def test_an_activation_that_is_not_finite_is_located() -> None:
    class Bad(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last = nn.Linear(9, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(torch.log(x))

    samples = torch.ones(2, 9)
    samples[1, 4] = 0.0
    with pytest.raises(BadInput) as caught:
        calibrate(placed(Bad(), samples.abs() + 1), source(samples))
    assert "calibration sample 1" in str(caught.value)


def test_no_samples_is_an_error() -> None:
    graph = placed(two_layers(), torch.randn(2, 11))
    with pytest.raises(BadInput, match="no calibration samples"):
        calibrate(graph, lambda: iter(()))
