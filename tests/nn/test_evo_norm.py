"""EvoNorm-B0 against a float64 numpy rendering of the equation, step by step."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from normfuse.nn import EvoNormB0

Array = NDArray[np.float64]
EPS = 1e-3

# float64: sums of at most 30 terms, divisions by deviations of about 1.
TOLERANCE = 1e-12


class Reference:
    """The equation on plain arrays (batch, channel, height, width), with its gradient in ``x`` by hand."""

    def __init__(self, norm: EvoNormB0) -> None:
        state = {key: value.numpy().copy() for key, value in norm.state_dict().items()}
        self.weight, self.bias, self.v, self.running = (state[key] for key in ("weight", "bias", "v", "running_var"))

    def step(self, x: Array, upstream: Array) -> tuple[Array, dict[str, Array]]:
        """Return y and the gradients of sum(y * upstream), and advance the running variance."""
        y, grad_x = np.empty_like(x), np.empty_like(x)
        grads = {key: np.zeros_like(self.weight) for key in ("weight", "bias", "v")}
        for c in range(x.shape[1]):
            batch, g = x[:, c], upstream[:, c]
            variance, count = batch.var(), batch.size
            self.running[c] = 0.9 * self.running[c] + 0.1 * variance * count / (count - 1)
            left = np.sqrt(variance + EPS)
            std = np.sqrt(batch.var(axis=(1, 2), keepdims=True) + EPS)
            right = self.v[c] * batch + std
            is_right = right > left
            divisor = np.where(is_right, right, left)
            y[:, c] = self.weight[c] * batch / divisor + self.bias[c]
            # dL/d(divisor), and from there to v, to each image's deviation and to the batch's.
            inner = -g * self.weight[c] * batch / divisor**2
            to_std = (inner * is_right).sum(axis=(1, 2), keepdims=True)
            centred = batch - batch.mean(axis=(1, 2), keepdims=True)
            to_left = (inner * ~is_right).sum()
            grad_x[:, c] = (
                g * self.weight[c] / divisor
                + inner * is_right * self.v[c]
                + to_std * centred / (std * batch[0].size)
                + to_left * (batch - batch.mean()) / (left * count)
            )
            grads["weight"][c] = (g * batch / divisor).sum()
            grads["bias"][c], grads["v"][c] = g.sum(), (inner * is_right * batch).sum()
        return y, {"x": grad_x, **grads}

    def inference(self, x: Array) -> Array:
        y = np.empty_like(x)
        for sample in range(x.shape[0]):
            for c in range(x.shape[1]):
                plane = x[sample, c]
                right = self.v[c] * plane + np.sqrt(plane.var() + EPS)
                divisor = np.maximum(np.sqrt(self.running[c] + EPS), right)
                y[sample, c] = self.weight[c] * plane / divisor + self.bias[c]
        return y


def randomized(norm: EvoNormB0, seed: int) -> EvoNormB0:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.uniform_(-2, 2, generator=generator)
        norm.running_var.uniform_(0.1, 3, generator=generator)
    return norm.double()


def images(seed: int) -> Array:
    return np.random.default_rng(seed).normal(0.4, 2.0, size=(2, 4, 3, 5))


def close(found: torch.Tensor | None, expected: Array) -> None:
    assert found is not None
    scale = np.abs(expected).max()
    np.testing.assert_allclose(found.detach().numpy(), expected, rtol=TOLERANCE, atol=TOLERANCE * scale)


def test_training_steps() -> None:
    norm = randomized(EvoNormB0(4), seed=1)
    reference = Reference(norm)
    for step in range(5):
        x = torch.tensor(images(step), requires_grad=True)
        norm.zero_grad()
        y = norm(x)
        y.backward(torch.tensor(images(100 + step)))
        expected, grads = reference.step(images(step), images(100 + step))
        close(y, expected)
        close(x.grad, grads["x"])
        for name, parameter in norm.named_parameters():
            close(parameter.grad, grads[name])
        close(norm.running_var, reference.running)


def test_inference_changes_nothing() -> None:
    norm = randomized(EvoNormB0(4), seed=2).eval()
    before = {key: value.clone() for key, value in norm.state_dict().items()}
    close(norm(torch.tensor(images(3))), Reference(norm).inference(images(3)))
    assert all(torch.equal(before[key], value) for key, value in norm.state_dict().items())


@pytest.mark.parametrize("is_training", [True, False])
def test_gradients(is_training: bool) -> None:
    norm = randomized(EvoNormB0(4), seed=4).train(is_training)
    assert torch.autograd.gradcheck(norm, (torch.tensor(images(5), requires_grad=True),), fast_mode=True)


def test_inference_is_exported_with_any_batch() -> None:
    norm = randomized(EvoNormB0(4), seed=6).eval()
    x = torch.tensor(images(7))
    shapes = {"x": {0: torch.export.Dim("batch")}}
    exported = torch.export.export(norm, (x,), dynamic_shapes=shapes, strict=False).module()
    torch.testing.assert_close(exported(x[:1]), norm(x[:1]), rtol=0, atol=0)


def test_one_value_per_channel_is_finite() -> None:
    norm = EvoNormB0(4)
    assert torch.isfinite(norm(torch.ones(1, 4, 1, 1))).all()
    torch.testing.assert_close(norm.running_var, torch.full((4,), 0.9))


def test_checkpoint_keys() -> None:
    shapes = {key: tuple(value.shape) for key, value in EvoNormB0(4).state_dict().items()}
    assert shapes == {"weight": (4,), "bias": (4,), "v": (4,), "running_var": (4,)}
