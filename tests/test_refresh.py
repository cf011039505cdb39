"""Refreshed statistics are those of the whole data, whatever its order and its batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from normfuse.errors import BadInput
from normfuse.graph import Graph, capture, ops, query
from normfuse.progress import Silent
from normfuse.refresh import refresh_norms
from normfuse.testing import Small, randomized, seeded

# float64: one rounding per sample and one of the sum.
TOLERANCE = 1e-12


def data(count: int, *shape: int, mean: float = 3.0) -> list[Tensor]:
    found = torch.randn((count, *shape), generator=seeded(4), dtype=torch.float64) * 2 + mean
    return list(found.split(1))


def source(samples: Sequence[Tensor]) -> Callable[[], Iterator[Sequence[Tensor]]]:
    return lambda: ([sample] for sample in samples)


def refreshed(model: nn.Module, samples: Sequence[Tensor]) -> Graph:
    graph = capture(model, (torch.cat([samples[0], samples[0]]),))
    refresh_norms(graph, source(samples), total=len(samples), progress=Silent())
    return graph


def statistics(graph: Graph) -> list[tuple[Tensor, Tensor]]:
    norms = [node for node in graph.nodes if query.is_call(node, ops.BATCH_NORM)]
    return [(query.constant(graph, n.args[3]), query.constant(graph, n.args[4])) for n in norms]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("norm", "shape"),
    [(nn.BatchNorm1d(3), (3,)), (nn.BatchNorm1d(3), (3, 7)), (nn.BatchNorm2d(3), (3, 5, 4))],
    ids=["vectors", "tokens", "images"],
)
def test_statistics_are_those_of_numpy_over_all_samples(norm: nn.Module, shape: tuple[int, ...]) -> None:
    samples = data(11, *shape)
    ((mean, variance),) = statistics(refreshed(randomized(nn.Sequential(norm)).double(), samples))
    rows = np.moveaxis(torch.cat(samples).numpy(), 1, -1).reshape(-1, 3)
    np.testing.assert_allclose(mean.numpy(), rows.mean(0), rtol=TOLERANCE)
    np.testing.assert_allclose(variance.numpy(), rows.var(0, ddof=1), rtol=TOLERANCE)


def test_it_is_what_pytorch_accumulates_over_one_batch_of_all() -> None:
    samples, model = data(9, 3, 5), nn.Sequential(nn.BatchNorm1d(3, momentum=None)).double()
    ((mean, variance),) = statistics(refreshed(model.eval(), samples))
    model.train()(torch.cat(samples))
    norm: Any = model[0]
    torch.testing.assert_close(mean, norm.running_mean, rtol=TOLERANCE, atol=0)
    torch.testing.assert_close(variance, norm.running_var, rtol=TOLERANCE, atol=0)


def test_a_large_mean_costs_no_digits() -> None:
    """Second moments about zero would leave the variance with no digit at all."""
    samples, model = data(13, 3, mean=1e9), nn.Sequential(nn.BatchNorm1d(3)).double()
    with torch.no_grad():
        model[0].get_buffer("running_mean").fill_(1e9)
    ((_, variance),) = statistics(refreshed(model.eval(), samples))
    # The data itself is rounded at 1e9 * 2^-53; the sums about the old mean lose nothing more.
    np.testing.assert_allclose(variance.numpy(), torch.cat(samples).numpy().var(0, ddof=1), rtol=1e-9)


def deep() -> nn.Module:
    parts = [nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Tanh(), nn.Linear(3, 5), nn.BatchNorm1d(5), nn.BatchNorm1d(5)]
    return randomized(nn.Sequential(*parts)).double()


def test_norms_in_a_row_see_what_the_refreshed_ones_make() -> None:
    model, samples = deep(), data(17, 4)
    graph = refreshed(model, samples)
    x = torch.cat(samples)
    parts: Any = model
    with torch.no_grad():
        for index, (mean, variance) in zip((1, 4, 5), statistics(graph), strict=True):
            seen = parts[:index](x)
            np.testing.assert_allclose(mean.numpy(), seen.numpy().mean(0), rtol=TOLERANCE, atol=TOLERANCE)
            np.testing.assert_allclose(variance.numpy(), seen.numpy().var(0, ddof=1), rtol=TOLERANCE, atol=TOLERANCE)
            parts[index].running_mean.copy_(seen.mean(0))
            parts[index].running_var.copy_(seen.var(0))
    torch.testing.assert_close(graph.run(x)[0], model(x), rtol=1e-11, atol=1e-11)


def test_norms_beside_each_other_take_one_run() -> None:
    runs = 0
    samples = data(3, 3)

    def counted() -> Iterator[Sequence[Tensor]]:
        nonlocal runs
        runs += 1
        return ([sample] for sample in samples)

    def function(m: Any, x: Tensor) -> Tensor:
        return m.behind(m.one(x) + m.other(x) + m.other(x))  # type: ignore[no-any-return]

    parts = {name: nn.BatchNorm1d(3) for name in ("one", "other", "behind")}
    graph = capture(randomized(Small(function, **parts)).double(), (torch.cat(samples),))
    assert refresh_norms(graph, counted, total=3, progress=Silent()) == 3, "one norm called twice is one"
    assert runs == 2
    first, *rest = statistics(graph)
    for pair in rest[:2]:  # each sums about its own old mean, so that they differ by rounding
        torch.testing.assert_close(pair, first, rtol=TOLERANCE, atol=TOLERANCE)


def test_a_norm_called_several_times_is_what_pytorch_accumulates() -> None:
    samples = data(9, 3, 5)
    calls = Small(lambda m, x: m.n(x) + m.n(x[..., :2] * 4 - 1).sum(-1, True) + m.n(-x), n=nn.BatchNorm1d(3))
    graph = refreshed(model := randomized(calls).double(), samples)
    norm: Any = model.n
    norm.momentum = None
    norm.reset_running_stats()
    model.train()(torch.cat(samples))
    for mean, variance in statistics(graph):
        torch.testing.assert_close(mean, norm.running_mean, rtol=TOLERANCE, atol=TOLERANCE)
        torch.testing.assert_close(variance, norm.running_var, rtol=TOLERANCE, atol=0)
    expected = model.eval()(torch.cat(samples))
    torch.testing.assert_close(graph.run(torch.cat(samples))[0], expected, rtol=1e-11, atol=1e-11)


def test_calls_of_one_norm_in_a_row_have_one_statistic() -> None:
    samples = data(9, 3)
    graph = refreshed(randomized(Small(lambda m, x: m.n(m.n(x).tanh()), n=nn.BatchNorm1d(3))).double(), samples)
    first, second = statistics(graph)
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    assert len({str(node.target) for node in graph.nodes if "running" in str(node.target)}) == 2
    again = refreshed(randomized(Small(lambda m, x: m.n(m.n(x).tanh()), n=nn.BatchNorm1d(3))).double(), samples[::-1])
    assert torch.equal(statistics(again)[1][1], second[1])


def test_order_does_not_matter_to_the_last_bit() -> None:
    samples = data(19, 4)
    shuffled = [samples[index] for index in torch.randperm(19, generator=seeded(1))]
    pairs = zip(statistics(refreshed(deep(), samples)), statistics(refreshed(deep(), shuffled)), strict=True)
    for one, other in pairs:
        assert torch.equal(one[0], other[0])
        assert torch.equal(one[1], other[1])


def test_the_batches_matter_to_rounding_only() -> None:
    """Samples come one at a time, so that batches do not matter at all; a model of a fixed batch sums within them."""
    samples = data(12, 4)
    batches = list(torch.cat(samples).split(4))
    pairs = zip(statistics(refreshed(deep(), samples)), statistics(refreshed(deep(), batches)), strict=True)
    for one, other in pairs:
        torch.testing.assert_close(one, other, rtol=TOLERANCE, atol=TOLERANCE)


def test_statistics_keep_their_type_and_the_model_its_own() -> None:
    model, samples = deep().float(), [sample.float() for sample in data(5, 4)]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    graph = refreshed(model, samples)
    assert {tensor.dtype for pair in statistics(graph) for tensor in pair} == {torch.float32}
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_one_position_has_no_variance() -> None:
    ((mean, variance),) = statistics(refreshed(nn.Sequential(nn.BatchNorm1d(3)).double().eval(), samples := data(1, 3)))
    torch.testing.assert_close(mean, samples[0][0], rtol=TOLERANCE, atol=0)
    assert variance.tolist() == [0.0, 0.0, 0.0]


def test_without_samples() -> None:
    graph = capture(deep(), (torch.cat(data(2, 4)),))
    with pytest.raises(BadInput, match="no samples"):
        refresh_norms(graph, source([]), total=0, progress=Silent())


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_values_that_are_no_numbers_are_refused(value: float) -> None:
    samples = data(3, 4)
    samples[1][0, 2] = value
    graph = capture(deep(), (torch.cat(data(2, 4)),))
    with pytest.raises(BadInput, match="not finite") as caught:
        refresh_norms(graph, source(samples), total=3, progress=Silent())
    assert "1" in str(caught.value)


def test_a_model_without_batch_norms_needs_no_run() -> None:
    graph = capture(nn.Linear(4, 3).eval(), (torch.randn(2, 4),))

    def never() -> Iterator[Sequence[Tensor]]:
        raise AssertionError

    assert refresh_norms(graph, never, total=3, progress=Silent()) == 0
