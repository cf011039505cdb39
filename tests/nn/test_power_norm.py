"""PowerNorm against a float64 numpy rendering of the equations, step by step."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from normfuse.errors import UsageError
from normfuse.nn import PowerNorm

Array = NDArray[np.float64]

# float64: 2.2e-16 per operation, sums of at most 35 terms, a dozen steps through averages, roots of about 1.
TOLERANCE = 1e-12


@dataclass
class Reference:
    """The authors' equations on plain arrays; shapes (batch, token, channel)."""

    weight: Array
    bias: Array
    phi: Array
    nu: Array
    groups: int
    warmup: int
    t: int
    eps: float = 1e-5

    def scale(self, x: Array) -> tuple[Array, Array]:
        """Return u and the root that every channel of a token was divided by."""
        size = x.shape[-1] // self.groups
        roots = np.empty_like(x)
        for group in range(self.groups):
            part = slice(group * size, (group + 1) * size)
            roots[..., part] = np.sqrt(np.mean(x[..., part] ** 2, axis=-1, keepdims=True) + self.eps)
        return x / roots, roots

    def scale_backward(self, u: Array, roots: Array, grad: Array) -> Array:
        size = u.shape[-1] // self.groups
        inner = np.empty_like(u)
        for group in range(self.groups):
            part = slice(group * size, (group + 1) * size)
            inner[..., part] = np.mean(grad[..., part] * u[..., part], axis=-1, keepdims=True)
        grad_x: Array = (grad - u * inner) / roots
        return grad_x

    def step(self, x: Array, upstream: Array, mask: NDArray[np.bool_] | None) -> tuple[Array, Array, Array, Array]:
        """Return y, dL/dx, dL/dweight, dL/dbias of L = sum(y * upstream), and advance the state."""
        self.t += 1
        u, roots = self.scale(x)
        valid = np.ones(x.shape[:2], dtype=bool) if mask is None else ~mask
        v = np.array([np.mean(u[..., c][valid] ** 2) for c in range(x.shape[2])])
        z = u / np.sqrt((v if self.t <= self.warmup else self.phi) + self.eps)
        if self.t < self.warmup:
            self.phi = self.phi * (self.t - 1) / self.t + v / self.t
        self.phi = 0.9 * self.phi + 0.1 * v
        g = self.weight * upstream - (1 - 0.9) * self.nu * z
        self.nu = self.nu + np.mean(g * z, axis=(0, 1))
        grad_x = self.scale_backward(u, roots, g / np.sqrt(v + self.eps))
        return self.weight * z + self.bias, grad_x, (upstream * z).sum(axis=(0, 1)), upstream.sum(axis=(0, 1))

    def inference(self, x: Array) -> Array:
        y: Array = self.weight * self.scale(x)[0] / np.sqrt(self.phi + self.eps) + self.bias
        return y


def started(norm: PowerNorm) -> Reference:
    return Reference(
        weight=norm.weight.detach().numpy().copy(),
        bias=norm.bias.detach().numpy().copy(),
        phi=norm.running_phi.numpy().reshape(-1).copy(),
        nu=norm.ema_gz.numpy().reshape(-1).copy(),
        groups=norm.groups or 0,
        warmup=norm.warmup,
        t=int(norm.iters),
    )


def randomized(norm: PowerNorm, seed: int) -> PowerNorm:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        norm.weight.uniform_(-2, 2, generator=generator)
        norm.bias.normal_(generator=generator)
        norm.running_phi.uniform_(0.2, 3, generator=generator)
        norm.ema_gz.normal_(generator=generator)
    return norm.double()


def close(found: torch.Tensor | None, expected: Array) -> None:
    assert found is not None
    array = found.detach().numpy()
    np.testing.assert_allclose(array, expected, rtol=TOLERANCE, atol=TOLERANCE * np.abs(expected).max())


def draw(seed: int, channels: int = 6) -> Array:
    return np.random.default_rng(seed).normal(0.4, 2.0, size=(5, 7, channels))


@pytest.mark.parametrize("groups", [1, 2, 3, 6])
@pytest.mark.parametrize("warmup", [0, 1, 5, 100])
def test_training_steps(groups: int, warmup: int) -> None:
    norm = randomized(PowerNorm(6, groups=groups, warmup=warmup), seed=1)
    reference = started(norm)
    for step in range(9):
        x, upstream = draw(step), draw(100 + step)
        mask = np.random.default_rng(step).random((5, 7)) < 0.3 if step % 3 == 2 else None
        given = torch.tensor(x, requires_grad=True)
        norm.zero_grad()
        y = norm(given, None if mask is None else torch.tensor(mask))
        y.backward(torch.tensor(upstream))
        expected = reference.step(x, upstream, mask)
        for ours, theirs in zip((y, given.grad, norm.weight.grad, norm.bias.grad), expected, strict=True):
            close(ours, theirs)
        close(norm.running_phi.flatten(), reference.phi)
        close(norm.ema_gz.flatten(), reference.nu)
        assert int(norm.iters) == reference.t


def test_warm_up_updates_the_running_moment_twice() -> None:
    # t = 1 forgets the start: phi = v, and 0.9 * v + 0.1 * v is v again. Without the first update 0.9 would remain.
    norm = PowerNorm(2, groups=None, warmup=2, eps=0.0)
    norm(torch.tensor([[3.0, 5.0]]))
    torch.testing.assert_close(norm.running_phi.flatten(), torch.tensor([9.0, 25.0]))
    norm(torch.tensor([[1.0, 1.0]]))  # t = 2 is not below the warm-up: the running average alone
    torch.testing.assert_close(norm.running_phi.flatten(), torch.tensor([8.2, 22.6]))


def test_the_first_gradient_is_exact_up_to_the_moment() -> None:
    norm = randomized(PowerNorm(6, groups=2), seed=3)
    norm.ema_gz.zero_()
    x = torch.tensor(draw(4), requires_grad=True)
    upstream = torch.tensor(draw(5))
    grouped = x.reshape(5, 7, 2, 3)
    u = (grouped / torch.sqrt(grouped.square().mean(dim=-1, keepdim=True) + 1e-5)).reshape(5, 7, 6)
    y = norm.weight * u / torch.sqrt(u.detach().square().mean(dim=(0, 1)) + 1e-5) + norm.bias
    wanted = torch.autograd.grad(y, (x, norm.weight, norm.bias), upstream)
    found = torch.autograd.grad(norm(x), (x, norm.weight, norm.bias), upstream)
    for ours, theirs in zip(found, wanted, strict=True):
        close(ours, theirs.numpy())


@pytest.mark.parametrize("groups", [1, 2, 3])
def test_inference_changes_nothing(groups: int) -> None:
    norm = randomized(PowerNorm(6, groups=groups), seed=6).eval()
    before = {key: value.clone() for key, value in norm.state_dict().items()}
    found = norm(torch.tensor(draw(7)), torch.ones(5, 7, dtype=torch.bool))
    close(found, started(norm).inference(draw(7)))
    assert all(torch.equal(before[key], value) for key, value in norm.state_dict().items())


def test_without_groups_inference_is_an_affine() -> None:
    norm = randomized(PowerNorm(6, groups=None), seed=8).eval()
    phi, weight, bias = (t.detach().flatten().numpy() for t in (norm.running_phi, norm.weight, norm.bias))
    close(norm(torch.tensor(draw(9))), weight * draw(9) / np.sqrt(phi + 1e-5) + bias)


@pytest.mark.parametrize("shape", [(35, 6), (5, 7, 6), (5, 1, 7, 6)], ids=str)
@pytest.mark.parametrize("is_training", [True, False])
def test_any_rank(shape: tuple[int, ...], is_training: bool) -> None:
    norm, other = (randomized(PowerNorm(6, groups=2), seed=10).train(is_training) for _ in range(2))
    found = norm(torch.tensor(draw(11)).reshape(shape))
    assert found.shape == shape
    close(found.reshape(5, 7, 6), other(torch.tensor(draw(11))).detach().numpy())


@pytest.mark.parametrize("groups", [None, 1, 3])
def test_inference_is_exported_with_any_batch(groups: int | None) -> None:
    norm = randomized(PowerNorm(6, groups=groups), seed=12).eval()
    x = torch.tensor(draw(13))
    shapes = {"x": {0: torch.export.Dim("batch")}}
    exported = torch.export.export(norm, (x,), dynamic_shapes=shapes, strict=False).module()
    torch.testing.assert_close(exported(x[:1]), norm(x[:1]), rtol=0, atol=0)


def test_half_precision_does_not_overflow() -> None:
    norm = PowerNorm(6, groups=2)
    x = torch.full((4, 6), 1000.0).half().requires_grad_()
    norm(x).sum().backward()
    assert x.grad is not None
    assert x.grad.dtype is torch.float16
    torch.testing.assert_close(norm.running_phi.flatten(), torch.ones(6), rtol=1e-6, atol=0)


def test_checkpoint_keys() -> None:
    shapes = {key: tuple(value.shape) for key, value in PowerNorm(6, groups=3).state_dict().items()}
    assert shapes == {
        "weight": (6,),
        "bias": (6,),
        "running_phi": (1, 6, 1, 1),
        "ema_gz": (1, 6, 1, 1),
        "iters": (1,),
    }


@pytest.mark.parametrize("groups", [0, -2, 4, 7])
def test_groups_divide_the_channels(groups: int) -> None:
    with pytest.raises(UsageError, match=f"{groups} groups do not divide 6 channels"):
        PowerNorm(6, groups=groups)
