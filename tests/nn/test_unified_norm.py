"""UnifiedNorm against a float64 numpy rendering of the equations, step by step."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from normfuse.nn import UnifiedNorm

Array = NDArray[np.float64]

# float64: 2.2e-16 per operation, sums of at most 35 terms, a dozen steps through contracting averages, and a
# division by statistics of about 1: 1e-13. One digit above that still sees a wrong eps or a wrong slot.
TOLERANCE = 1e-12


@dataclass
class Reference:
    """The published equations and the authors' constants, on plain arrays; shapes (batch, token, channel)."""

    weight: Array
    bias: Array
    phi_running: Array
    psi: Array
    forward_ring: Array
    backward_ring: Array
    warmup: int
    filtration: bool
    t: int
    skipped: int = 0
    eps: float = 1e-5
    keep: float = 0.9

    def step(self, x: Array, upstream: Array, mask: NDArray[np.bool_] | None) -> tuple[Array, Array, Array, Array]:
        """Return y, dL/dx, dL/dweight, dL/dbias of L = sum(y * upstream), and advance the state."""
        self.t += 1
        m_f, m_b = len(self.forward_ring), len(self.backward_ring)
        valid = np.ones(x.shape[:2], dtype=bool) if mask is None else ~mask
        v = np.array([np.mean(x[..., c][valid] ** 2) for c in range(x.shape[2])])
        skip = m_f <= 1
        tau = np.var(np.sqrt(self.forward_ring), ddof=1)
        self.forward_ring[self.t % m_f] = v
        if self.filtration and self.t >= self.warmup:
            gap = self.forward_ring.mean(axis=0) - self._geometric()
            if np.any(gap > m_f * tau):
                self.forward_ring[self.t % m_f] = self.phi_running
                skip = True
                self.skipped += 1
        phi = v if self.t <= m_f or self.t < self.warmup or skip else self._geometric()
        r = np.ones_like(phi)
        if self.t > max(1000, self.warmup) and not skip:
            r = np.clip(np.sqrt(phi + self.eps) / np.sqrt(self.phi_running + self.eps), 1 / 5, 5)
        z = x / np.sqrt(phi + self.eps)
        self.phi_running = self.keep * self.phi_running + (1 - self.keep) * phi

        g = r * self.weight * upstream
        h = np.mean(g * z, axis=(0, 1))
        self.backward_ring[self.t % m_b] = self.psi if skip else h
        mean = h if self.t <= m_b or self.t < self.warmup or skip else self.backward_ring.mean(axis=0)
        self.psi = self.keep * self.psi + (1 - self.keep) * mean
        grad_x = (g - (mean if skip else self.psi) * z) / np.sqrt(phi + self.eps)
        return self.weight * z + self.bias, grad_x, (upstream * r * z).sum(axis=(0, 1)), upstream.sum(axis=(0, 1))

    def _geometric(self) -> Array:
        with np.errstate(divide="ignore"):
            mean: Array = np.exp(np.mean(np.log(self.forward_ring), axis=0))
        return mean


def started(norm: UnifiedNorm) -> Reference:
    """Return the reference in the state of the module."""
    return Reference(
        weight=norm.weight.detach().numpy().copy(),
        bias=norm.bias.detach().numpy().copy(),
        phi_running=norm.running_var.numpy().copy(),
        psi=norm.ema_gz.numpy().copy(),
        forward_ring=norm.buffer_x2.numpy().copy(),
        backward_ring=norm.buffer_gz.numpy().copy(),
        warmup=norm.warmup,
        filtration=norm.outlier_filtration,
        t=int(norm.iters),
    )


def randomized(norm: UnifiedNorm, seed: int) -> UnifiedNorm:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        norm.weight.uniform_(-2, 2, generator=generator)
        norm.bias.normal_(generator=generator)
        norm.running_var.uniform_(0.2, 3, generator=generator)
        norm.ema_gz.normal_(generator=generator)
    return norm.double()


def compare(norm: UnifiedNorm, *, steps: int, seed: int, scales: dict[int, float] | None = None) -> Reference:
    """Train module and reference side by side and hold everything equal after each step."""
    reference, draw = started(norm), np.random.default_rng(seed)
    channels = len(norm.weight)
    for step in range(steps):
        x = draw.normal(size=(5, 7, channels)) * draw.uniform(0.2, 3, channels) * (scales or {}).get(step, 1.0)
        upstream = draw.normal(size=x.shape)
        mask = draw.random((5, 7)) < 0.3 if step % 3 == 2 else None
        given = torch.tensor(x, requires_grad=True)
        norm.zero_grad()
        y = norm(given, None if mask is None else torch.tensor(mask))
        y.backward(torch.tensor(upstream))
        expected = reference.step(x, upstream, mask)
        found = (y, given.grad, norm.weight.grad, norm.bias.grad)
        state = (norm.running_var, norm.ema_gz, norm.buffer_x2, norm.buffer_gz)
        wanted = (reference.phi_running, reference.psi, reference.forward_ring, reference.backward_ring)
        for ours, theirs in zip((*found, *state), (*expected, *wanted), strict=True):
            assert ours is not None
            np.testing.assert_allclose(
                ours.detach().numpy(), theirs, rtol=TOLERANCE, atol=TOLERANCE * np.abs(theirs).max()
            )
        assert int(norm.iters) == reference.t
        assert int(norm.skip_counter) == reference.skipped
    return reference


@pytest.mark.parametrize("window", [1, 2, 4, (3, 5), (5, 2), (1, 3)], ids=str)
@pytest.mark.parametrize("warmup", [1, 7, 100])
def test_training_steps(window: int | tuple[int, int], warmup: int) -> None:
    norm = randomized(UnifiedNorm(3, window=window, warmup=warmup), seed=1)
    compare(norm, steps=12, seed=2)


@pytest.mark.parametrize("warmup", [3, 1004])
def test_the_ratio_begins_after_a_thousand_iterations(warmup: int) -> None:
    norm = randomized(UnifiedNorm(3, warmup=warmup), seed=3)
    norm.iters.fill_(996)
    compare(norm, steps=14, seed=4)


@pytest.mark.parametrize("running", [1e-6, 1e6])
def test_the_ratio_is_clipped(running: float) -> None:
    norm = randomized(UnifiedNorm(3, warmup=1), seed=5)
    compare(norm, steps=6, seed=6)
    norm.iters.fill_(2000)
    norm.running_var.fill_(running)
    compare(norm, steps=4, seed=7)


def test_iterations_that_jump_are_left_out() -> None:
    # All channels alike and steady: the spread is small, and a batch ten times as large stands out.
    norm = UnifiedNorm(3, warmup=6, outlier_filtration=True).double()
    reference = compare(norm, steps=16, seed=8, scales={9: 10.0, 13: 20.0})
    assert reference.skipped >= 2


@pytest.mark.parametrize(("root", "skips"), [(0.5, 1), (0.8, 0), (3.2, 0), (3.5, 1)])
def test_the_threshold_is_the_unbiased_variance_of_the_stale_buffer(root: float, skips: int) -> None:
    # Roots 1 and 2 of the stale buffer: unbiased variance 1/2, so the threshold is 2 * 1/2 = 1. With 4 kept and
    # v new, the gap is (root of v - 2)**2 / 2. The population variance, or the new buffer's, would answer otherwise.
    norm = UnifiedNorm(1, window=2, warmup=1, outlier_filtration=True)
    norm.buffer_x2.copy_(torch.tensor([[1.0], [4.0]]))
    norm.iters.fill_(9)
    norm(torch.full((3, 2, 1), root))
    assert int(norm.skip_counter) == skips


def test_filtration_waits_for_the_warm_up() -> None:
    norm = UnifiedNorm(3, warmup=100, outlier_filtration=True).double()
    assert compare(norm, steps=8, seed=9, scales={6: 50.0}).skipped == 0


def test_without_a_window_the_gradient_is_exact() -> None:
    norm = randomized(UnifiedNorm(3, window=1), seed=10)
    x = torch.randn(4, 5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(11), requires_grad=True)
    upstream = torch.randn(4, 5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(12))
    plain = norm.weight * x / torch.sqrt(x.square().mean(dim=(0, 1)) + norm.eps) + norm.bias
    expected = torch.autograd.grad(plain, (x, norm.weight, norm.bias), upstream)
    found = torch.autograd.grad(norm(x), (x, norm.weight, norm.bias), upstream)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=TOLERANCE, atol=TOLERANCE * float(theirs.abs().max()))


@pytest.mark.parametrize("shape", [(35, 3), (5, 7, 3), (5, 1, 7, 3)], ids=str)
def test_any_rank(shape: tuple[int, ...]) -> None:
    x = torch.randn(35, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(13))
    flat, shaped = (randomized(UnifiedNorm(3, warmup=1), seed=14) for _ in range(2))
    for _ in range(5):
        expected, found = flat(x[None])[0], shaped(x.reshape(shape))
    assert found.shape == shape
    torch.testing.assert_close(found.reshape(35, 3), expected, rtol=TOLERANCE, atol=TOLERANCE)
    torch.testing.assert_close(shaped.running_var, flat.running_var, rtol=TOLERANCE, atol=0)


def test_inference_is_an_affine_and_changes_nothing() -> None:
    norm = randomized(UnifiedNorm(3), seed=15).eval()
    before = {key: value.clone() for key, value in norm.state_dict().items()}
    x = 100 * torch.randn(2, 5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(16))
    weight, bias, phi = (t.detach().numpy() for t in (norm.weight, norm.bias, norm.running_var))
    expected = weight * x.numpy() / np.sqrt(phi + 1e-5) + bias
    found = norm(x, torch.ones(2, 5, dtype=torch.bool)).detach().numpy()
    np.testing.assert_allclose(found, expected, rtol=TOLERANCE, atol=TOLERANCE * np.abs(expected).max())
    assert all(torch.equal(before[key], value) for key, value in norm.state_dict().items())


def test_inference_is_exported_with_any_batch() -> None:
    norm = randomized(UnifiedNorm(3), seed=17).eval()
    x = torch.randn(2, 5, 3, dtype=torch.float64)
    batch = torch.export.Dim("batch")
    exported = torch.export.export(norm, (x,), dynamic_shapes={"x": {0: batch}}).module()
    torch.testing.assert_close(exported(x[:1]), norm(x[:1]), rtol=0, atol=0)


def test_checkpoint_keys() -> None:
    norm = UnifiedNorm(3, window=(4, 6))
    shapes = {key: tuple(value.shape) for key, value in norm.state_dict().items()}
    assert shapes == {
        "weight": (3,),
        "bias": (3,),
        "running_var": (3,),
        "ema_gz": (3,),
        "iters": (1,),
        "buffer_x2": (4, 3),
        "buffer_gz": (6, 3),
        "skip_counter": (1,),
    }


def test_statistics_keep_float32_under_autocast() -> None:
    # bfloat16 has 8 bits: 1 + 2**-10 would round to 1 in every product.
    norm = UnifiedNorm(3, window=1, keep=0.0)
    x = torch.full((64, 2, 3), 3.0).bfloat16().requires_grad_()
    y = norm(x)
    y.sum().backward()
    assert y.dtype is torch.float32
    assert x.grad is not None
    assert x.grad.dtype is torch.bfloat16
    torch.testing.assert_close(norm.running_var, torch.full((3,), 9.0), rtol=1e-6, atol=0)


def test_it_learns() -> None:
    torch.manual_seed(18)
    net = nn.Sequential(nn.Linear(4, 16), UnifiedNorm(16, warmup=20), nn.ReLU(), nn.Linear(16, 1))
    optimizer = torch.optim.Adam(net.parameters(), lr=0.02)
    x = torch.randn(256, 4)
    target = x[:, :1] * x[:, 1:2]
    for _ in range(300):
        optimizer.zero_grad()
        loss = (net(x) - target).square().mean()
        loss.backward()
        optimizer.step()
    # The target's own mean square is about 1, which is what a constant answer leaves; eval mode must do well too.
    with torch.no_grad():
        assert float((net.eval()(x) - target).square().mean()) < 0.1
