"""SimplifiedLinearAttention against a float64 numpy rendering of the equations, head by head."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from normfuse.errors import UsageError
from normfuse.nn import SimplifiedLinearAttention

Array = NDArray[np.float64]

# float64: sums of at most 15 * 12 terms, quotients of positive sums.
TOLERANCE = 1e-12


def reference(attention: SimplifiedLinearAttention, x: Array) -> Array:
    """Sample by sample, head by head, token by token; the convolution tap by tap."""
    state = {key: value.numpy() for key, value in attention.state_dict().items()}
    channels, heads, (height, width) = x.shape[2], attention.heads, (attention.height, attention.width)
    size = channels // heads
    joined = np.empty_like(x)
    for sample in range(x.shape[0]):
        qkv = x[sample] @ state["qkv.weight"].T + state["qkv.bias"]
        q_all, k_all, v_all = qkv[:, :channels], qkv[:, channels : 2 * channels], qkv[:, 2 * channels :]
        k_all = k_all + state["positional_encoding"][0]
        for head in range(heads):
            part = slice(head * size, (head + 1) * size)
            q, k, v = np.maximum(q_all[:, part], 0), np.maximum(k_all[:, part], 0), v_all[:, part]
            for i in range(height * width):
                shares = np.array([q[i] @ k[j] for j in range(height * width)])
                joined[sample, i, part] = shares @ v / (shares.sum() + 1e-6)
            joined[sample, :, part] += depthwise(v, state["dwc.weight"], state["dwc.bias"], height, width)
    projected: Array = joined @ state["proj.weight"].T + state["proj.bias"]
    return projected


def depthwise(v: Array, weight: Array, bias: Array, height: int, width: int) -> Array:
    image, kernel = v.reshape(height, width, -1), weight.shape[-1]
    y = np.zeros_like(image) + bias
    for row in range(height):
        for column in range(width):
            for a in range(kernel):
                for b in range(kernel):
                    r, c = row + a - kernel // 2, column + b - kernel // 2
                    if 0 <= r < height and 0 <= c < width:
                        y[row, column] += weight[:, 0, a, b] * image[r, c]
    flat: Array = y.reshape(height * width, -1)
    return flat


def randomized(attention: SimplifiedLinearAttention, seed: int) -> SimplifiedLinearAttention:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.normal_(0.0, 0.6, generator=generator)
    return attention.double()


def draw(*shape: int, seed: int) -> Array:
    return np.random.default_rng(seed).normal(0.2, 1.0, size=shape)


CASES = [
    pytest.param(6, (3, 5), 2, 5, id="linear"),
    pytest.param(12, (2, 3), 1, 3, id="quadratic"),
    pytest.param(12, (2, 3), 2, 1, id="as-many-tokens-as-channels"),
    pytest.param(9, 4, 3, 7, id="square"),
]


@pytest.mark.parametrize(("channels", "grid", "heads", "kernel"), CASES)
def test_forward(channels: int, grid: int | tuple[int, int], heads: int, kernel: int) -> None:
    attention = randomized(SimplifiedLinearAttention(channels, grid, heads, kernel_size=kernel), seed=1)
    x = draw(2, attention.height * attention.width, channels, seed=2)
    expected = reference(attention, x)
    for module in (attention, attention.eval()):
        found = module(torch.tensor(x)).detach().numpy()
        np.testing.assert_allclose(found, expected, rtol=TOLERANCE, atol=TOLERANCE * np.abs(expected).max())


@pytest.mark.parametrize(("channels", "grid", "heads", "kernel"), CASES)
def test_the_cheaper_order_is_taken(channels: int, grid: int | tuple[int, int], heads: int, kernel: int) -> None:
    attention = SimplifiedLinearAttention(channels, grid, heads, kernel_size=kernel).eval()
    tokens, size = attention.height * attention.width, channels // heads
    exported = torch.export.export(attention, (torch.zeros(2, tokens, channels),), strict=False)
    shapes = {
        tuple(node.meta["val"].shape) for node in exported.graph.nodes if node.target == torch.ops.aten.matmul.default
    }
    # The published comparison, with as many keys as queries and values as wide as keys.
    is_linear = tokens * tokens * (size + size) > size * size * (tokens + tokens)
    assert ((2, heads, size, size) in shapes) == (is_linear or tokens == size)
    assert ((2, heads, tokens, tokens) in shapes) == (not is_linear or tokens == size)


@pytest.mark.parametrize(("grid", "heads"), [((2, 3), 2), ((2, 1), 1)], ids=["linear", "quadratic"])
def test_gradients(grid: tuple[int, int], heads: int) -> None:
    attention = randomized(SimplifiedLinearAttention(4, grid, heads, kernel_size=3), seed=3)
    x = torch.tensor(draw(2, grid[0] * grid[1], 4, seed=4), requires_grad=True)
    names, parameters = zip(*attention.named_parameters(), strict=True)

    def forward(x: torch.Tensor, *values: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = torch.func.functional_call(attention, dict(zip(names, values, strict=True)), (x,))
        return y

    assert torch.autograd.gradcheck(forward, (x, *parameters), fast_mode=True)


def test_a_query_without_a_positive_entry_gets_nothing() -> None:
    attention = randomized(SimplifiedLinearAttention(4, (2, 3), 1), seed=5)
    with torch.no_grad():
        attention.qkv.weight[:4].zero_()
        attention.qkv.bias[:4].fill_(-1.0)
        attention.dwc.weight.zero_()
        attention.dwc.bias.zero_()  # type: ignore[union-attr]
    y = attention(torch.tensor(draw(2, 6, 4, seed=6)))
    torch.testing.assert_close(y, attention.proj.bias.expand_as(y), rtol=0, atol=0)


def test_sums_do_not_overflow_in_half_precision() -> None:
    # Sums of 30 shares of 12 * 20 * 20 = 4800 pass float16's 65504; the weighted mean of equal values is the value.
    attention = SimplifiedLinearAttention(12, (5, 6), 1, kernel_size=1)
    with torch.no_grad():
        attention.qkv.weight.zero_()
        attention.qkv.bias.fill_(20.0)
        attention.dwc.weight.zero_()
        attention.dwc.bias.zero_()  # type: ignore[union-attr]
        attention.proj.weight.copy_(torch.eye(12))
        attention.proj.bias.zero_()
    x = torch.zeros(1, 30, 12)
    assert torch.equal(attention.half()(x.half()), torch.full((1, 30, 12), 20.0).half())
    with torch.autocast("cpu", torch.float16):
        assert torch.equal(attention.float()(x), torch.full((1, 30, 12), 20.0).half())


def test_inference_is_exported_with_any_batch() -> None:
    attention = randomized(SimplifiedLinearAttention(6, (3, 5), 2), seed=7).eval()
    x = torch.tensor(draw(2, 15, 6, seed=8))
    shapes = {"x": {0: torch.export.Dim("batch")}}
    exported = torch.export.export(attention, (x,), dynamic_shapes=shapes, strict=False)
    assert not [node for node in exported.graph.nodes if isinstance(node.target, torch._ops.HigherOrderOperator)]
    torch.testing.assert_close(exported.module()(x[:1]), attention(x[:1]), rtol=TOLERANCE, atol=TOLERANCE)


def test_checkpoint_keys() -> None:
    shapes = {key: tuple(value.shape) for key, value in SimplifiedLinearAttention(6, (3, 5), 2).state_dict().items()}
    assert shapes == {
        "qkv.weight": (18, 6),
        "qkv.bias": (18,),
        "proj.weight": (6, 6),
        "proj.bias": (6,),
        "dwc.weight": (3, 1, 5, 5),
        "dwc.bias": (3,),
        "positional_encoding": (1, 15, 6),
    }
    without = SimplifiedLinearAttention(6, 2, 2, has_bias=False)
    assert "qkv.bias" not in without.state_dict()
    assert without(torch.zeros(1, 4, 6)).shape == (1, 4, 6)


@pytest.mark.parametrize(("heads", "kernel"), [(0, 5), (4, 5), (2, 4)])
def test_what_does_not_fit_is_refused(heads: int, kernel: int) -> None:
    with pytest.raises(UsageError, match=r"do not divide 6 channels|does not keep the grid"):
        SimplifiedLinearAttention(6, 3, heads, kernel_size=kernel)


def test_it_stands_in_a_model() -> None:
    model = nn.Sequential(nn.LayerNorm(6), SimplifiedLinearAttention(6, (3, 5), 2))
    model(torch.zeros(2, 15, 6)).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
