"""Calibration: exact, independent of batching and order, and it picks by local output error."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from normfuse.calibration import COMPETED, _Contest, calibrate
from normfuse.errors import BadInput
from normfuse.export.placement import X86_VNNI
from normfuse.graph import Graph, capture, query
from normfuse.graph.quantization import requests
from normfuse.passes.place_quantizers import PlaceQuantizers
from normfuse.passes.presets import CANONICAL, FOLD, LOWER
from normfuse.pipeline import Pipeline
from normfuse.quant import UINT8, DyadicHistogram, asymmetric, candidates, quantize_dequantize
from normfuse.recipe import CalibrationMethod
from normfuse.testing import seeded


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


def test_more_samples_than_compete_give_the_same_ranges_in_any_order() -> None:
    samples = torch.randn(150, 11, generator=seeded(0)) * torch.linspace(0.1, 9, 150)[:, None]
    graph = placed(two_layers(), samples[:2])
    order = torch.randperm(150, generator=seeded(1))
    found = calibrate(graph, source(samples))
    assert any(chosen.errors for chosen in found.chosen.values())
    assert found == calibrate(graph, source(samples[order]))


def test_ranges_to_choose_from_come_from_all_samples_and_the_choice_from_some(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = list[int]()
    samples = torch.randn(150, 11, generator=seeded(0))
    samples[:, 0] = torch.arange(150) / 10
    graph = placed(two_layers(), samples[:2])
    update = _Contest.update

    def count(contest: _Contest, value: Tensor) -> None:
        seen.extend([round(float(value[0, 0]) * 10)] if value.shape == (1, 11) else [])
        update(contest, value)

    monkeypatch.setattr(_Contest, "update", count)
    found = calibrate(graph, source(samples))
    assert len(seen) == len(set(seen)) == COMPETED
    assert min(seen) < 40  # drawn from all over them
    assert max(seen) >= 110
    (image,) = [node.name for node in graph.inputs]
    assert found.chosen[image].observed.maximum == float(samples.max())
    assert found.samples == 150


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
            result: Tensor = self.last(torch.log(x))
            return result

    samples = torch.ones(2, 9)
    samples[1, 4] = 0.0
    with pytest.raises(BadInput) as caught:
        calibrate(placed(Bad(), samples.abs() + 1), source(samples))
    assert "calibration sample 1" in str(caught.value)


def test_no_samples_is_an_error() -> None:
    graph = placed(two_layers(), torch.randn(2, 11))
    with pytest.raises(BadInput, match="no calibration samples"):
        calibrate(graph, lambda: iter(()))


class Readers(nn.Module):
    """One tensor, read by what ``forward`` is given; its first channel does not matter to the convolution."""

    def __init__(self, readers: Any) -> None:
        super().__init__()
        torch.manual_seed(6)
        self.make = nn.Conv1d(8, 8, 1, bias=False)
        self.conv, self.linear = nn.Conv1d(8, 6, 3, stride=2, padding=1, dilation=2), nn.Linear(9, 4)
        self.readers = readers
        with torch.no_grad():
            self.make.weight.copy_(torch.eye(8)[..., None])
            self.conv.weight[:, 0] = 0.0

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.readers(self, self.make(x))
        return result


CASES: list[Any] = [
    pytest.param(
        lambda m, y: m.conv(y),
        lambda m, wrong: [torch.conv1d(wrong, m.conv.weight, None, 2, 1, 2)],
        id="a convolution",
    ),
    pytest.param(lambda m, y: y.tanh(), lambda m, wrong: [wrong], id="no linear map"),
    pytest.param(
        lambda m, y: m.conv(y).sum() + m.linear(y).sum() + y.tanh().sum(),
        lambda m, wrong: [torch.conv1d(wrong, m.conv.weight, None, 2, 1, 2), wrong @ m.linear.weight.mT, wrong],
        id="all at once",
    ),
]


@pytest.mark.parametrize(("readers", "errors_of"), CASES)
def test_every_reader_counts(readers: Any, errors_of: Any) -> None:
    samples = torch.randn(COMPETED, 8, 9, generator=torch.Generator().manual_seed(5))
    samples[7, 0, 4] = 400.0  # in the channel that the convolution ignores
    model = Readers(readers)
    graph = placed(model, samples[:2])
    (made,) = [each.source.name for each in requests(graph) if query.layer_of(each.source) == "make"]
    found = calibrate(graph, source(samples)).chosen[made]

    histogram = DyadicHistogram()
    histogram.update(samples)
    sums = {}
    for label, candidate in candidates(histogram, UINT8).items():
        wrong = quantize_dequantize(samples, asymmetric(candidate.minimum, candidate.maximum, UINT8)) - samples
        sums[label] = sum(float(error.detach().double().square().sum()) for error in errors_of(model, wrong))
    smallest = min(sums.values())
    # Sums of at most 24 float32 products, in another order.
    assert found.errors == pytest.approx({label: value / smallest for label, value in sums.items()}, rel=1e-5)
    assert sums[found.method] == smallest


def test_what_no_sample_reaches_has_no_range() -> None:
    class Empty(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = nn.Linear(8, 3), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.one(x), self.other(x[:, 5:])

    samples = torch.randn(4, 5, 8, generator=torch.Generator().manual_seed(0))
    graph = placed(Empty(), samples)
    assert len(requests(graph)) == 2
    assert set(calibrate(graph, source(samples)).chosen) == {"x"}
