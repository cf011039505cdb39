"""Weight standardization against a float64 numpy rendering of both published forms."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from normfuse.errors import UsageError
from normfuse.nn import Deviation, StandardizedConv2d, standardize_convs, standardize_weight

Array = NDArray[np.float64]

# float64, sums of at most 60 terms, one division by a deviation of about 1.
TOLERANCE = 1e-12


def reference(weight: Array, deviation: Deviation, eps: float) -> Array:
    """One filter after the other, from the definition of the unbiased variance."""
    standardized = np.empty_like(weight)
    for o, row in enumerate(weight.reshape(len(weight), -1)):
        variance = ((row - row.sum() / row.size) ** 2).sum() / (row.size - 1)
        root = np.sqrt(variance) + eps if deviation is Deviation.EPS_OUTSIDE else np.sqrt(variance + eps)
        standardized[o] = (weight[o] - row.sum() / row.size) / root
    return standardized


def convolution(x: Array, weight: Array, bias: Array) -> Array:
    """A plain 'valid' convolution of one group with stride 1."""
    batch, _, height, width = x.shape
    out, _, kh, kw = weight.shape
    y = np.empty((batch, out, height - kh + 1, width - kw + 1))
    for i in range(y.shape[2]):
        for j in range(y.shape[3]):
            window = x[:, :, i : i + kh, j : j + kw]
            y[:, :, i, j] = np.tensordot(window, weight, axes=([1, 2, 3], [1, 2, 3])) + bias
    return y


def close(found: torch.Tensor, expected: Array) -> None:
    scale = np.abs(expected).max()
    np.testing.assert_allclose(found.detach().numpy(), expected, rtol=TOLERANCE, atol=TOLERANCE * scale)


def draw(*shape: int, seed: int) -> Array:
    return np.random.default_rng(seed).normal(0.3, 2.0, size=shape)


@pytest.mark.parametrize("deviation", Deviation)
@pytest.mark.parametrize("shape", [(5, 3, 2, 7), (4, 1, 3, 3), (6, 3), (2, 3, 5), (1, 2, 3, 2, 5)], ids=str)
@pytest.mark.parametrize("eps", [1e-5, 0.1])
def test_weights_of_any_rank(shape: tuple[int, ...], deviation: Deviation, eps: float) -> None:
    weight = draw(*shape, seed=1)
    found = standardize_weight(torch.tensor(weight), deviation=deviation, eps=eps)
    close(found, reference(weight, deviation, eps))


@pytest.mark.parametrize("deviation", Deviation)
def test_forward(deviation: Deviation) -> None:
    conv = StandardizedConv2d(nn.Conv2d(3, 5, (2, 3)).double(), deviation=deviation)
    x, weight = draw(2, 3, 4, 7, seed=2), conv.weight.detach().numpy().copy()
    assert conv.bias is not None
    expected = convolution(x, reference(weight, deviation, 1e-5), conv.bias.detach().numpy())
    close(conv(torch.tensor(x)), expected)
    close(conv.eval()(torch.tensor(x)), expected)
    assert np.array_equal(conv.weight.detach().numpy(), weight)


@pytest.mark.parametrize("deviation", Deviation)
def test_gradients(deviation: Deviation) -> None:
    conv = StandardizedConv2d(nn.Conv2d(4, 6, (2, 3), stride=2, padding=1, groups=2).double(), deviation=deviation)
    x = torch.tensor(draw(2, 4, 5, 7, seed=3), requires_grad=True)

    def forward(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = torch.func.functional_call(conv, {"weight": weight}, (x,))
        return y

    assert torch.autograd.gradcheck(forward, (x, conv.weight), fast_mode=True)


def test_a_constant_filter_is_silent() -> None:
    conv = StandardizedConv2d(nn.Conv2d(3, 2, 3, bias=False))
    with torch.no_grad():
        conv.weight.fill_(0.5)
    y = conv(torch.tensor(draw(1, 3, 4, 5, seed=4)).float())
    y.sum().backward()
    assert torch.equal(y, torch.zeros_like(y))
    assert conv.weight.grad is not None
    assert torch.isfinite(conv.weight.grad).all()


def test_the_options_of_the_convolution_are_kept() -> None:
    plain = nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2), groups=2, padding_mode="reflect")
    conv = StandardizedConv2d(plain.double().eval())
    x = torch.tensor(draw(2, 4, 7, 9, seed=5))
    assert conv.weight is plain.weight
    assert not conv.training
    found = conv(x)
    with torch.no_grad():
        plain.weight.copy_(standardize_weight(plain.weight))
    close(found, plain(x).detach().numpy())


@pytest.mark.parametrize("deviation", Deviation)
def test_inference_is_exported_with_any_batch(deviation: Deviation) -> None:
    conv = StandardizedConv2d(nn.Conv2d(3, 5, (2, 3), padding=1), deviation=deviation).eval()
    x = torch.tensor(draw(2, 3, 4, 7, seed=6)).float()
    shapes = {"x": {0: torch.export.Dim("batch")}}
    exported = torch.export.export(conv, (x,), dynamic_shapes=shapes, strict=False).module()
    torch.testing.assert_close(exported(x[:1]), conv(x[:1]), rtol=0, atol=0)


def test_checkpoint_keys() -> None:
    assert set(StandardizedConv2d(nn.Conv2d(3, 5, 2)).state_dict()) == {"weight", "bias"}
    assert set(StandardizedConv2d(nn.Conv2d(3, 5, 2, bias=False)).state_dict()) == {"weight"}


def test_a_filter_of_one_weight_is_refused() -> None:
    with pytest.raises(UsageError, match="a filter of one weight cannot be standardized"):
        StandardizedConv2d(nn.Conv2d(3, 3, 1, groups=3))


def test_convolutions_are_replaced() -> None:
    model = nn.Sequential(nn.Conv2d(3, 5, 2), nn.BatchNorm2d(5), nn.Sequential(nn.Conv2d(5, 4, 1), nn.ReLU()))
    model.add_module("again", model[0])
    before = set(model.state_dict())
    replaced = standardize_convs(model, deviation=Deviation.EPS_INSIDE, only=lambda path, conv: conv.in_channels == 3)
    assert replaced == ["0", "again"]
    assert isinstance(model[0], StandardizedConv2d)
    assert model[0].deviation is Deviation.EPS_INSIDE
    assert model[3] is model[0]
    assert set(model.state_dict()) == before
    assert standardize_convs(model) == ["2.0"]
