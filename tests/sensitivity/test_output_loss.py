"""What errors of outputs cost, by hand, and that random directions have the curvature of that cost."""

from __future__ import annotations

from math import log

import pytest
import torch
from small_subject import EPS, captured
from torch import Tensor, nn

from normfuse.errors import UsageError
from normfuse.quant.output_kind import OutputKind
from normfuse.sensitivity.output_loss import OutputLoss, surprise
from normfuse.testing import seeded

EPS64 = torch.finfo(torch.float64).eps


def logs(*odds: list[float]) -> Tensor:
    """Class scores whose probabilities are in these proportions."""
    return torch.tensor(odds, dtype=torch.float64).log()


def test_divergence_is_from_the_exact_probabilities() -> None:
    """p = (1/2, 1/2), q = (1/4, 3/4): the sum of p log(p / q) is (log 2 + log 2/3) / 2; the other way it is another."""
    wanted, found = logs([1, 1], [1, 3]), logs([5, 15], [7, 7])
    losses = OutputLoss.DIVERGENCE.per_sample([found], [wanted])
    expected = [(log(2) + log(2 / 3)) / 2, log(1 / 2) / 4 + 3 * log(3 / 2) / 4]
    torch.testing.assert_close(losses, torch.tensor(expected, dtype=torch.float64), atol=8 * EPS64, rtol=0)


def test_divergence_is_the_mean_over_classes_of_the_mean_over_their_pixels_and_the_sum_over_outputs() -> None:
    """Of four pixels float finds class 1 in one alone; an error there counts three times one that is elsewhere."""
    wanted, found = logs([1, 1], [1, 1]), logs([1, 3], [1, 1])
    one = (log(2) + log(2 / 3)) / 2
    dense = logs([3, 1], [3, 1], [1, 3], [3, 1]).T.reshape(1, 2, 2, 2).repeat(2, 1, 1, 1)
    guessed = dense.clone()
    guessed[0, :, 1, 0] = 0.0
    guessed[1, :, 0, 0] = 0.0
    pixel = 3 / 4 * log(3 / 2) + log(1 / 2) / 4
    losses = OutputLoss.DIVERGENCE.per_sample([found, guessed], [wanted, dense])
    expected = torch.tensor([one + pixel / 2, pixel / 6], dtype=torch.float64)
    torch.testing.assert_close(losses, expected, atol=8 * EPS64, rtol=0)


def test_divergence_does_not_feel_a_shift_of_all_scores() -> None:
    wanted = torch.randn(3, 5, generator=seeded(0), dtype=torch.float64)
    losses = OutputLoss.DIVERGENCE.per_sample([wanted + 7], [wanted])
    torch.testing.assert_close(losses, torch.zeros(3, dtype=torch.float64), atol=32 * EPS64, rtol=0)


NOISES = [
    pytest.param([[3.0, 4.0], [0.0, 2.0]], [[3.0, 5.0], [1.0, 1.0]], [1 / 25, 2 / 4], id="features"),
    pytest.param([[[3.0], [4.0]], [[0.0], [2.0]]], [[[3.0], [5.0]], [[1.0], [1.0]]], [1 / 25, 2 / 4], id="tokens"),
    pytest.param([4.0, -2.0, 1.0], [5.0, -2.0, 3.0], [1 / 16, 0.0, 4.0], id="no features"),
]


@pytest.mark.parametrize(("wanted", "found", "expected"), NOISES)
def test_noise_is_relative_to_every_sample(wanted: list[object], found: list[object], expected: list[float]) -> None:
    losses = OutputLoss.NOISE.per_sample([torch.tensor(found)], [torch.tensor(wanted)])
    torch.testing.assert_close(losses, torch.tensor(expected, dtype=torch.float64), atol=4 * EPS64, rtol=0)
    assert losses.dtype is torch.float64


def test_a_sample_whose_outputs_are_zero_has_no_noise_and_no_curvature() -> None:
    wanted = torch.tensor([[0.0, 0.0, 0.0], [0.0, 2.0, 0.0]])
    assert OutputLoss.NOISE.per_sample([wanted + 1], [wanted]).tolist() == [0.0, 3 / 4]
    (found,) = OutputLoss.NOISE.probe([wanted], seeded(0))
    assert found[0].tolist() == [0.0, 0.0, 0.0]
    assert bool(found[1].all())


RANKS = [
    pytest.param(lambda m, x: m.a(x), OutputLoss.DIVERGENCE, id="classes"),
    pytest.param(lambda m, x: (m.a(x), m.b(x), m.a(x).argmax(1)), OutputLoss.DIVERGENCE, id="classes and integers"),
    pytest.param(lambda m, x: m.b(x)[:, :1], OutputLoss.NOISE, id="one number"),
    pytest.param(lambda m, x: m.b(x).mean(1), OutputLoss.NOISE, id="no features"),
    pytest.param(lambda m, x: m.b(x).unsqueeze(2), OutputLoss.NOISE, id="tokens"),
    pytest.param(lambda m, x: m.b(x)[:, :, None, None], OutputLoss.DIVERGENCE, id="pixels"),
    pytest.param(lambda m, x: (m.a(x), m.b(x).unsqueeze(2)), OutputLoss.NOISE, id="classes and tokens"),
    pytest.param(lambda m, x: m.a(x).argmax(1), OutputLoss.NOISE, id="integers alone"),
]


@pytest.mark.parametrize(("function", "expected"), RANKS)
def test_outputs_are_compared_as_classes_if_all_can_be(function: object, expected: OutputLoss) -> None:
    graph = captured(function, torch.randn(2, 9), parts={"a": nn.Linear(9, 4), "b": nn.Linear(9, 5)})  # type: ignore[arg-type]
    assert OutputLoss.of(graph) is expected


def test_the_user_may_say_what_outputs_are() -> None:
    parts = {"a": nn.Linear(9, 4), "b": nn.Linear(9, 5)}
    classes = captured(lambda m, x: m.a(x), torch.randn(2, 9), parts=parts)
    assert OutputLoss.of(classes, OutputKind.VALUES) is OutputLoss.NOISE
    assert OutputLoss.of(classes, OutputKind.CLASSES) is OutputLoss.DIVERGENCE
    for function in (lambda m, x: (m.a(x), m.b(x).unsqueeze(2)), lambda m, x: m.a(x).argmax(1)):
        others = captured(function, torch.randn(2, 9), parts=parts)
        assert OutputLoss.of(others, OutputKind.VALUES) is OutputLoss.NOISE
        with pytest.raises(UsageError, match="no class scores") as caught:
            OutputLoss.of(others, OutputKind.CLASSES)
        assert "--outputs values" in str(caught.value)


def test_a_class_that_is_ruled_out_has_no_part_in_it() -> None:
    """Minus infinity in both; gradients are those of the other classes alone."""
    scores = torch.tensor([[0.3, -torch.inf, 1.2]], dtype=torch.float64)
    found = torch.tensor([[0.9, -torch.inf, 0.1]], dtype=torch.float64, requires_grad=True)
    loss = OutputLoss.DIVERGENCE.per_sample([found], [scores])
    rest = torch.tensor([[0.9, 0.1]], dtype=torch.float64, requires_grad=True)
    expected = OutputLoss.DIVERGENCE.per_sample([rest], [scores[:, ::2]])
    torch.testing.assert_close(loss, expected, atol=8 * EPS64, rtol=0)
    (gradient,), (wanted,) = torch.autograd.grad(loss.sum(), [found]), torch.autograd.grad(expected.sum(), [rest])
    assert float(gradient[0, 1]) == 0
    torch.testing.assert_close(gradient[:, ::2], wanted, atol=8 * EPS64, rtol=0)


DRAWN = 40_000


def covariance(loss: OutputLoss, wanted: Tensor) -> Tensor:
    """The mean of ``u u^T`` of one sample's probes, drawn as a batch of the same sample."""
    drawn = wanted.expand(DRAWN, *wanted.shape[1:])
    (found,) = loss.probe([drawn], seeded(3))
    assert found.shape == drawn.shape
    assert found.dtype is wanted.dtype
    rows = found.flatten(1).double()
    return rows.T @ rows / DRAWN


def hessian(loss: OutputLoss, wanted: Tensor) -> Tensor:
    """The second derivatives of a sample's loss at its float outputs."""
    shape = wanted.shape

    def at(found: Tensor) -> Tensor:
        return loss.per_sample([found.reshape(shape)], [wanted]).sum()

    return torch.autograd.functional.hessian(at, wanted.flatten())  # type: ignore[no-untyped-call, no-any-return]


@pytest.mark.parametrize("loss", OutputLoss)
@pytest.mark.parametrize("shape", [(1, 3), (1, 3, 2, 1), (1, 2, 3, 2)])
def test_probes_have_the_curvature_of_the_loss(loss: OutputLoss, shape: tuple[int, ...]) -> None:
    wanted = torch.randn(shape, generator=seeded(1), dtype=torch.float64)
    exact = hessian(loss, wanted)
    # An entry is a mean of products of two normal numbers, of variance h_ii h_jj + h_ij^2; 5 deviations of it.
    deviation = ((exact.diagonal()[:, None] * exact.diagonal() + exact.square()) / DRAWN).sqrt()
    assert bool(((covariance(loss, wanted) - exact).abs() <= 5 * deviation + 16 * EPS64).all())


def test_the_curvature_of_the_divergence_is_that_of_the_probabilities() -> None:
    p = torch.tensor([0.1, 0.3, 0.6], dtype=torch.float64)
    exact = torch.diag(p) - p.outer(p)
    torch.testing.assert_close(hessian(OutputLoss.DIVERGENCE, p.log()[None]), exact, atol=16 * EPS64, rtol=0)
    deviation = ((exact.diagonal()[:, None] * exact.diagonal() + exact.square()) / DRAWN).sqrt()
    found = covariance(OutputLoss.DIVERGENCE, p.log()[None])
    assert bool(((found - exact).abs() <= 5 * deviation).all())


@pytest.mark.parametrize("wanted", [torch.tensor([3.0, -4.0]), torch.tensor([[3.0, 0.0], [0.0, -4.0]])])
def test_probes_of_noise_are_as_large_as_the_outputs_are_small(wanted: Tensor) -> None:
    (first,) = OutputLoss.NOISE.probe([wanted], seeded(0))
    (second,) = OutputLoss.NOISE.probe([torch.ones_like(wanted)], seeded(0))
    sizes = wanted.reshape(2, -1).norm(dim=1) / torch.ones_like(wanted).reshape(2, -1).norm(dim=1)
    torch.testing.assert_close(first.reshape(2, -1) * sizes[:, None], second.reshape(2, -1), rtol=4 * EPS, atol=0)


def test_probes_of_several_outputs_are_independent_and_repeatable() -> None:
    wanted = [torch.zeros(3, 4), torch.zeros(3, 4)]
    first, second = OutputLoss.DIVERGENCE.probe(wanted, seeded(0))
    assert not torch.equal(first, second)
    again, _ = OutputLoss.DIVERGENCE.probe(wanted, seeded(0))
    assert torch.equal(first, again)


def test_surprise_is_that_of_the_class_that_is_found() -> None:
    """Probabilities 3/4 and 5/6 of the largest: - log 3/4 - log 5/6; of pixels 2/3, 3/4 and 3/4 that of each class."""
    pixels = logs([2, 1], [1, 3], [1, 3]).T.reshape(1, 2, 1, 3)
    expected = -log(3 / 4) - log(5 / 6) + (-log(2 / 3) - log(3 / 4)) / 2
    found = surprise([logs([1, 3], [5, 1])]) + surprise([pixels])
    assert float(found) == pytest.approx(expected, rel=16 * EPS64)
