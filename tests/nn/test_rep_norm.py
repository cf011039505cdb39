"""RepBN and PRepBN against a float64 numpy rendering of the equations."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from normfuse.nn import PRepBN, RepBN

Array = NDArray[np.float64]
EPS = 1e-5
MOMENTUM = 0.1

# float64, sums of 35 terms, one division by a deviation of about 1.
TOLERANCE = 1e-12


class Reference:
    """LayerNorm, RepBN and their mixture on plain arrays (batch, token, channel)."""

    def __init__(self, norm: PRepBN) -> None:
        state = {key: value.numpy().copy() for key, value in norm.state_dict().items()}
        self.ln = state["norm1.weight"], state["norm1.bias"]
        self.bn = state["norm2.bn.weight"], state["norm2.bn.bias"]
        self.mean, self.variance = state["norm2.bn.running_mean"], state["norm2.bn.running_var"]
        self.eta = state["norm2.alpha"]

    def layer_norm(self, x: Array) -> Array:
        centred = x - x.mean(axis=-1, keepdims=True)
        normed: Array = self.ln[0] * centred / np.sqrt(x.var(axis=-1, keepdims=True) + EPS) + self.ln[1]
        return normed

    def trained_repbn(self, x: Array) -> Array:
        mean, variance, count = x.mean(axis=(0, 1)), x.var(axis=(0, 1)), x.shape[0] * x.shape[1]
        self.mean = (1 - MOMENTUM) * self.mean + MOMENTUM * mean
        self.variance = (1 - MOMENTUM) * self.variance + MOMENTUM * variance * count / (count - 1)
        normed: Array = self.bn[0] * (x - mean) / np.sqrt(variance + EPS) + self.bn[1] + self.eta * x
        return normed

    def inference(self, x: Array) -> Array:
        a = self.bn[0] / np.sqrt(self.variance + EPS) + self.eta
        c = self.bn[1] - self.bn[0] * self.mean / np.sqrt(self.variance + EPS)
        normed: Array = a * x + c
        return normed


def randomized(norm: PRepBN, seed: int) -> PRepBN:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.uniform_(-2, 2, generator=generator)
        norm.norm2.bn.get_buffer("running_mean").normal_(generator=generator)
        norm.norm2.bn.get_buffer("running_var").uniform_(0.1, 3, generator=generator)
    return norm.double()


def close(found: torch.Tensor, expected: Array) -> None:
    scale = np.abs(expected).max()
    np.testing.assert_allclose(found.detach().numpy(), expected, rtol=TOLERANCE, atol=TOLERANCE * scale)


def batch(seed: int) -> Array:
    return np.random.default_rng(seed).normal(0.4, 2.0, size=(5, 7, 3))


@pytest.mark.parametrize(("warm", "total", "start"), [(0, 4, 1.0), (2, 5, 1.0), (1, 3, 0.5), (0, 0, 1.0)])
def test_progress_from_layer_norm_to_repbn(warm: int, total: int, start: float) -> None:
    norm = randomized(PRepBN(3, total_step=total, warm=warm, start=start), seed=1)
    reference = Reference(norm)
    for step in range(warm + total + 2):
        x = batch(step)
        y = norm(torch.tensor(x))
        if step < warm:
            close(y, reference.layer_norm(x))
            assert int(norm.warm) == warm - step - 1
            assert int(norm.iter) == total
            continue
        left = max(total - (step - warm), 0)
        share = start * left / total if total else 0.0
        close(y, share * reference.layer_norm(x) + (1 - share) * reference.trained_repbn(x))
        assert int(norm.iter) == max(left - 1, 0)
        close(norm.norm2.bn.get_buffer("running_mean"), reference.mean)
        close(norm.norm2.bn.get_buffer("running_var"), reference.variance)
    assert int(norm.norm2.bn.get_buffer("num_batches_tracked")) == total + 2


@pytest.mark.parametrize("left", [0, 3, 10])
def test_inference_is_repbn_whatever_the_progress(left: int) -> None:
    norm = randomized(PRepBN(3, total_step=10, warm=2), seed=2)
    norm.iter.fill_(left)
    norm.eval()
    before = {key: value.clone() for key, value in norm.state_dict().items()}
    close(norm(torch.tensor(batch(3))), Reference(norm).inference(batch(3)))
    assert all(torch.equal(before[key], value) for key, value in norm.state_dict().items())


def test_gradients_follow_the_mixture() -> None:
    norm = randomized(PRepBN(3, total_step=4), seed=4)
    norm.iter.fill_(3)
    x = torch.tensor(batch(5), requires_grad=True)
    mean, variance = x.mean(dim=(0, 1)), x.var(dim=(0, 1), unbiased=False)
    bn = norm.norm2.bn.weight * (x - mean) / torch.sqrt(variance + EPS) + norm.norm2.bn.bias + norm.norm2.alpha * x
    centred = x - x.mean(dim=-1, keepdim=True)
    ln = norm.norm1.weight * centred / torch.sqrt(x.var(dim=-1, unbiased=False, keepdim=True) + EPS) + norm.norm1.bias
    upstream = torch.tensor(batch(6))
    wanted = torch.autograd.grad(0.75 * ln + 0.25 * bn, (x, *norm.parameters()), upstream)
    found = torch.autograd.grad(norm(x), (x, *norm.parameters()), upstream)
    for ours, theirs in zip(found, wanted, strict=True):
        # The batch norm's gradient cancels three terms of its own size: two digits of headroom.
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("shape", [(35, 3), (5, 7, 3), (5, 1, 7, 3)], ids=str)
@pytest.mark.parametrize("is_training", [True, False])
def test_any_rank(shape: tuple[int, ...], is_training: bool) -> None:
    x = torch.tensor(batch(7))
    norm = randomized(PRepBN(3), seed=8).norm2.train(is_training)
    other = randomized(PRepBN(3), seed=8).norm2.train(is_training)
    found = norm(x.reshape(shape))
    assert found.shape == shape
    close(found.reshape(5, 7, 3), other(x).detach().numpy())


def test_inference_is_exported_with_any_batch() -> None:
    norm = randomized(PRepBN(3), seed=9).eval()
    x = torch.tensor(batch(10))
    exported = torch.export.export(norm, (x,), dynamic_shapes={"x": {0: torch.export.Dim("batch")}}).module()
    torch.testing.assert_close(exported(x[:1]), norm(x[:1]), rtol=0, atol=0)


def test_checkpoint_keys() -> None:
    bn = {f"bn.{key}" for key in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")}
    assert set(RepBN(3).state_dict()) == {"alpha", *bn}
    rest = {f"norm2.{key}" for key in ("alpha", *bn)} | {"norm1.weight", "norm1.bias"}
    assert set(PRepBN(3).state_dict()) == {"warm", "iter", "total_step", *rest}
    assert RepBN(3).alpha.shape == (1,)


def test_progress_travels_in_the_checkpoint() -> None:
    norm, other = (randomized(PRepBN(3, total_step=9, warm=1), seed=11) for _ in range(2))
    for step in range(4):
        norm(torch.tensor(batch(step)))
    other.load_state_dict(norm.state_dict())
    assert (int(other.warm), int(other.iter), int(other.total_step)) == (0, 6, 9)
    close(other(torch.tensor(batch(12))), norm(torch.tensor(batch(12))).detach().numpy())
