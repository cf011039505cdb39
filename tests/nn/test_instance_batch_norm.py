"""IBN against a float64 numpy rendering, with parts that are not halves."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from normfuse.errors import UsageError
from normfuse.nn import IBN

Array = NDArray[np.float64]
EPS = 1e-5

# float64: sums of at most 45 terms, one division by a deviation of about 1.
TOLERANCE = 1e-12

SPLITS = [
    pytest.param(6, 0.5, 3, id="even"),
    pytest.param(7, 0.5, 3, id="odd"),
    pytest.param(8, 0.25, 2, id="quarter"),
    pytest.param(7, 0.8, 5, id="more-than-half"),
]


class Reference:
    """Instance and batch norm on plain arrays (batch, channel, height, width)."""

    def __init__(self, norm: IBN, first: int) -> None:
        state = {key: value.numpy().copy() for key, value in norm.state_dict().items()}
        self.first = first
        self.weight = np.concatenate((state["IN.weight"], state["BN.weight"]))
        self.bias = np.concatenate((state["IN.bias"], state["BN.bias"]))
        self.mean, self.variance = state["BN.running_mean"], state["BN.running_var"]

    def train(self, x: Array) -> Array:
        rest = x[:, self.first :]
        mean, variance, count = rest.mean(axis=(0, 2, 3)), rest.var(axis=(0, 2, 3)), rest[:, 0].size
        self.mean = 0.9 * self.mean + 0.1 * mean
        self.variance = 0.9 * self.variance + 0.1 * variance * count / (count - 1)
        return self.normalize(x, mean, variance)

    def inference(self, x: Array) -> Array:
        return self.normalize(x, self.mean, self.variance)

    def normalize(self, x: Array, mean: Array, variance: Array) -> Array:
        y = np.empty_like(x)
        for sample in range(x.shape[0]):
            for c in range(x.shape[1]):
                plane, b = x[sample, c], c - self.first
                m, v = (plane.mean(), plane.var()) if b < 0 else (mean[b], variance[b])
                y[sample, c] = self.weight[c] * (plane - m) / np.sqrt(v + EPS) + self.bias[c]
        return y


def randomized(norm: IBN, seed: int) -> IBN:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.uniform_(-2, 2, generator=generator)
        norm.BN.get_buffer("running_mean").normal_(generator=generator)
        norm.BN.get_buffer("running_var").uniform_(0.1, 3, generator=generator)
    return norm.double()


def images(channels: int, seed: int) -> Array:
    return np.random.default_rng(seed).normal(0.4, 2.0, size=(3, channels, 3, 5))


def close(found: torch.Tensor, expected: Array) -> None:
    scale = np.abs(expected).max()
    np.testing.assert_allclose(found.detach().numpy(), expected, rtol=TOLERANCE, atol=TOLERANCE * scale)


@pytest.mark.parametrize(("channels", "ratio", "first"), SPLITS)
def test_training_steps_and_inference(channels: int, ratio: float, first: int) -> None:
    norm = randomized(IBN(channels, ratio=ratio), seed=1)
    reference = Reference(norm, first)
    for step in range(3):
        close(norm(torch.tensor(images(channels, step))), reference.train(images(channels, step)))
        close(norm.BN.get_buffer("running_mean"), reference.mean)
        close(norm.BN.get_buffer("running_var"), reference.variance)
    before = {key: value.clone() for key, value in norm.eval().state_dict().items()}
    close(norm(torch.tensor(images(channels, 4))), reference.inference(images(channels, 4)))
    assert all(torch.equal(before[key], value) for key, value in norm.state_dict().items())


@pytest.mark.parametrize("is_training", [True, False])
def test_gradients(is_training: bool) -> None:
    norm = randomized(IBN(7), seed=5).train(is_training)
    x = torch.tensor(images(7, 6), requires_grad=True)
    assert torch.autograd.gradcheck(norm, (x,), fast_mode=True)
    norm(x).sum().backward()
    assert all(parameter.grad is not None for parameter in norm.parameters())


@pytest.mark.parametrize(("channels", "ratio", "first"), SPLITS)
def test_inference_is_exported_with_any_batch(channels: int, ratio: float, first: int) -> None:
    norm = randomized(IBN(channels, ratio=ratio), seed=7).eval()
    x = torch.tensor(images(channels, 8))
    shapes = {"x": {0: torch.export.Dim("batch")}}
    exported = torch.export.export(norm, (x,), dynamic_shapes=shapes, strict=False).module()
    torch.testing.assert_close(exported(x[:1]), norm(x[:1]), rtol=0, atol=0)


def test_checkpoint_keys() -> None:
    shapes = {key: tuple(value.shape) for key, value in IBN(8, ratio=0.25).state_dict().items()}
    batch = {f"BN.{key}": (6,) for key in ("weight", "bias", "running_mean", "running_var")}
    assert shapes == {"IN.weight": (2,), "IN.bias": (2,), "BN.num_batches_tracked": (), **batch}


@pytest.mark.parametrize(("channels", "ratio"), [(1, 0.5), (7, 0.1), (7, 1.0), (7, 0.0), (4, 1.5), (4, -0.5)])
def test_an_empty_part_is_refused(channels: int, ratio: float) -> None:
    with pytest.raises(UsageError, match="leaves one part empty"):
        IBN(channels, ratio=ratio)
