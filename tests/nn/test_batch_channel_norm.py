"""BatchChannelNorm and EstBN against a float64 numpy rendering of the equations, step by step."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from normfuse.errors import UsageError
from normfuse.nn import BatchChannelNorm, EstBN

Array = NDArray[np.float64]
EPS = 1e-5

# float64: 2.2e-16 per operation, sums of at most 60 terms, two normalizations by deviations of about 1.
TOLERANCE = 1e-12


class Reference:
    """BN or EstBN, then GN per group, on plain arrays (batch, channel, height, width)."""

    def __init__(self, norm: BatchChannelNorm) -> None:
        state = {key: value.numpy().copy() for key, value in norm.state_dict().items()}
        self.outer = state["weight"].reshape(-1), state["bias"].reshape(-1)
        self.inner = state["bn.weight"], state["bn.bias"]
        self.mean, self.variance = state["bn.running_mean"], state["bn.running_var"]
        self.speed = float(state["bn.estbn_moving_speed"][0]) if "bn.estbn_moving_speed" in state else None

    def train(self, x: Array) -> Array:
        if self.speed is not None:
            return self.estimated(x)
        mean, variance, count = x.mean(axis=(0, 2, 3)), x.var(axis=(0, 2, 3)), x.size // x.shape[1]
        self.mean = 0.9 * self.mean + 0.1 * mean
        self.variance = 0.9 * self.variance + 0.1 * variance * count / (count - 1)
        return self.group(self.affine(x, mean, variance))

    def estimated(self, x: Array) -> Array:
        assert self.speed is not None
        mean = np.array([x[:, c].mean() for c in range(x.shape[1])])
        variance = np.array([((x[:, c] - self.mean[c]) ** 2).mean() for c in range(x.shape[1])])
        self.mean = self.mean + self.speed * (mean - self.mean)
        self.variance = self.variance + self.speed * (variance - self.variance)
        return self.inference(x)

    def inference(self, x: Array) -> Array:
        return self.group(self.affine(x, self.mean, self.variance))

    def affine(self, x: Array, mean: Array, variance: Array) -> Array:
        m, v, gamma, beta = (t[None, :, None, None] for t in (mean, variance, *self.inner))
        y: Array = gamma * (x - m) / np.sqrt(v + EPS) + beta
        return y

    def group(self, x: Array) -> Array:
        y, size = np.empty_like(x), x.shape[1] // len(self.outer[0])
        for sample in range(x.shape[0]):
            for g, (gamma, beta) in enumerate(zip(*self.outer, strict=True)):
                part = x[sample, g * size : (g + 1) * size]
                y[sample, g * size : (g + 1) * size] = gamma * (part - part.mean()) / np.sqrt(part.var() + EPS) + beta
        return y


def randomized(norm: BatchChannelNorm, seed: int) -> BatchChannelNorm:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.uniform_(-2, 2, generator=generator)
        norm.bn.get_buffer("running_mean").normal_(generator=generator)
        norm.bn.get_buffer("running_var").uniform_(0.1, 3, generator=generator)
        if isinstance(norm.bn, EstBN):
            norm.bn.estbn_moving_speed.fill_(0.3)
    return norm.double()


def close(found: torch.Tensor, expected: Array) -> None:
    scale = np.abs(expected).max()
    np.testing.assert_allclose(found.detach().numpy(), expected, rtol=TOLERANCE, atol=TOLERANCE * scale)


def images(seed: int) -> Array:
    return np.random.default_rng(seed).normal(0.4, 2.0, size=(2, 6, 3, 5))


@pytest.mark.parametrize("is_estimated", [False, True])
@pytest.mark.parametrize("groups", [1, 2, 3, 6])
def test_training_steps(groups: int, is_estimated: bool) -> None:
    norm = randomized(BatchChannelNorm(6, groups=groups, is_estimated=is_estimated), seed=1)
    reference = Reference(norm)
    for step in range(5):
        close(norm(torch.tensor(images(step))), reference.train(images(step)))
        close(norm.bn.get_buffer("running_mean"), reference.mean)
        close(norm.bn.get_buffer("running_var"), reference.variance)


@pytest.mark.parametrize("is_estimated", [False, True])
def test_inference_changes_nothing(is_estimated: bool) -> None:
    norm = randomized(BatchChannelNorm(6, groups=2, is_estimated=is_estimated), seed=2).eval()
    before = {key: value.clone() for key, value in norm.state_dict().items()}
    close(norm(torch.tensor(images(3))), Reference(norm).inference(images(3)))
    assert all(torch.equal(before[key], value) for key, value in norm.state_dict().items())


@pytest.mark.parametrize("is_estimated", [False, True])
@pytest.mark.parametrize("is_training", [False, True])
def test_gradients(is_training: bool, is_estimated: bool) -> None:
    norm = randomized(BatchChannelNorm(6, groups=2, is_estimated=is_estimated), seed=4).train(is_training)
    if isinstance(norm.bn, EstBN):
        norm.bn.estbn_moving_speed.zero_()  # with moving estimates the forward is not a function of x alone
    x = torch.tensor(images(5), requires_grad=True)
    assert torch.autograd.gradcheck(norm, (x,), fast_mode=True)
    upstream = torch.tensor(images(6))
    norm(x).backward(upstream)
    for name, parameter in norm.named_parameters():
        nudged = torch.zeros_like(parameter)
        nudged.view(-1)[-1] = 1e-6
        with torch.no_grad():
            ahead, behind = (
                (torch.func.functional_call(norm, {name: parameter + sign * nudged}, (x,)) * upstream).sum()
                for sign in (1, -1)
            )
        assert parameter.grad is not None
        # Central differences: error of the order of the step's square, and of rounding over the step (1e-9).
        torch.testing.assert_close(parameter.grad.view(-1)[-1], (ahead - behind) / 2e-6, rtol=1e-6, atol=1e-6)


def test_no_gradient_passes_through_the_estimates() -> None:
    norm = EstBN(6).double()
    norm.estbn_moving_speed.fill_(1.0)  # the estimates are the batch's own
    x = torch.tensor(images(7), requires_grad=True)
    norm(x).backward(torch.ones_like(x))
    expected = np.broadcast_to(1 / np.sqrt(norm.running_var.numpy() + EPS)[None, :, None, None], x.shape)
    assert x.grad is not None
    close(x.grad, np.asarray(expected))


def test_two_forwards_before_backward() -> None:
    norm = EstBN(6).double()
    norm.estbn_moving_speed.fill_(0.5)
    first, second = (torch.tensor(images(seed), requires_grad=True) for seed in (8, 9))
    y = norm(first)
    root = torch.sqrt(norm.running_var + EPS)
    (y.sum() + norm(second).sum()).backward()
    assert first.grad is not None
    close(first.grad[0, :, 0, 0], (1 / root).numpy())


def test_estimates_stand_still_at_speed_zero() -> None:
    norm = EstBN(6)
    x = torch.tensor(images(10)).float()
    torch.testing.assert_close(norm(x), x / (1 + EPS) ** 0.5)
    assert torch.equal(norm.running_mean, torch.zeros(6))


@pytest.mark.parametrize("is_estimated", [False, True])
def test_inference_is_exported_with_any_batch(is_estimated: bool) -> None:
    norm = randomized(BatchChannelNorm(6, groups=2, is_estimated=is_estimated), seed=11).eval()
    x = torch.tensor(images(12))
    shapes = {"x": {0: torch.export.Dim("batch")}}
    exported = torch.export.export(norm, (x,), dynamic_shapes=shapes, strict=False).module()
    torch.testing.assert_close(exported(x[:1]), norm(x[:1]), rtol=0, atol=0)


@pytest.mark.parametrize("is_estimated", [False, True])
def test_checkpoint_keys(is_estimated: bool) -> None:
    norm = BatchChannelNorm(6, groups=3, is_estimated=is_estimated)
    shapes = {key: tuple(value.shape) for key, value in norm.state_dict().items()}
    inner = {f"bn.{key}": (6,) for key in ("weight", "bias", "running_mean", "running_var")}
    speed = {"bn.estbn_moving_speed": (1,)} if is_estimated else {}
    assert shapes == {"weight": (1, 3, 1), "bias": (1, 3, 1), "bn.num_batches_tracked": (), **inner, **speed}


def test_checkpoints_of_the_imagenet_models_load() -> None:
    norm = torch.nn.Sequential(randomized(BatchChannelNorm(6, groups=3), seed=13))
    published = {key.replace(".bn.", ".pbn."): value for key, value in norm.state_dict().items()}
    other = torch.nn.Sequential(BatchChannelNorm(6, groups=3).double())
    other.load_state_dict(published)
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in norm.state_dict().items())
    assert "0.pbn.weight" in published  # the caller's own mapping is left as it was


@pytest.mark.parametrize("groups", [0, 4, 32])
def test_groups_divide_the_channels(groups: int) -> None:
    with pytest.raises(UsageError, match=f"{groups} groups do not divide 6 channels"):
        BatchChannelNorm(6, groups=groups)
