"""RMSNorm and CRMSNorm against a float64 numpy rendering, and against layer norm."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from normfuse.errors import UsageError
from normfuse.nn import CRMSNorm, RMSNorm, compress_channels, expand_channels

Array = NDArray[np.float64]

# float64: sums of at most 11 terms and one root.
TOLERANCE = 1e-13


def rms(x: Array, eps: float) -> Array:
    """Token by token."""
    rows = x.reshape(-1, x.shape[-1])
    return np.array([row / np.sqrt(sum(row**2) / len(row) + eps) for row in rows]).reshape(x.shape)


def draw(*shape: int, seed: int) -> Array:
    return np.random.default_rng(seed).normal(0.7, 2.0, size=shape)


def close(found: Tensor, expected: Array) -> None:
    scale = np.abs(expected).max()
    np.testing.assert_allclose(found.detach().numpy(), expected, rtol=TOLERANCE, atol=TOLERANCE * scale)


@pytest.mark.parametrize("eps", [1e-5, 0.3])
@pytest.mark.parametrize("shape", [(7,), (5, 7), (2, 5, 11), (2, 3, 5, 1)], ids=str)
def test_rms_norm(shape: tuple[int, ...], eps: float) -> None:
    x, weight = draw(*shape, seed=1), draw(shape[-1], seed=2)
    close(RMSNorm(shape[-1], eps=eps)(torch.tensor(x)), rms(x, eps))
    norm = RMSNorm(shape[-1], eps=eps, has_weight=True).double()
    norm.load_state_dict({"weight": torch.tensor(weight)})
    close(norm(torch.tensor(x)), rms(x, eps) * weight)


@pytest.mark.parametrize("eps", [1e-5, 0.3])
@pytest.mark.parametrize("shape", [(2,), (5, 7), (2, 5, 11)], ids=str)
def test_compressed_rms_norm_is_the_whole_one_without_a_channel(shape: tuple[int, ...], eps: float) -> None:
    x = draw(*shape, seed=3)
    centred = x - x.mean(axis=-1, keepdims=True)
    close(CRMSNorm(shape[-1], eps=eps)(torch.tensor(centred[..., :-1])), rms(centred, eps)[..., :-1])


def test_round_trip_through_one_channel_less_is_layer_norm() -> None:
    x = torch.tensor(draw(2, 5, 11, seed=4))
    z = compress_channels(x)
    assert z.shape == (2, 5, 10)
    expected = F.layer_norm(x, (11,), eps=1e-5).numpy()
    close(expand_channels(z), (x - x.mean(dim=-1, keepdim=True)).numpy())
    close(expand_channels(CRMSNorm(11)(z)), expected)
    close(RMSNorm(11)(expand_channels(z)), expected)


def test_a_compressed_pre_norm_block_is_the_original() -> None:
    torch.manual_seed(5)
    norm, first, second = nn.LayerNorm(7).double(), nn.Linear(7, 13).double(), nn.Linear(13, 7).double()
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.normal_()
    x = torch.tensor(draw(3, 7, seed=6))
    expected = compress_channels(x + second(torch.relu(first(norm(x)))))

    # Reader: the affine goes in, then W'[:, j] = W[:, j] - W[:, -1]. Writer: centred over its outputs, one row less.
    affine_in = first.weight * norm.weight
    reader, reader_bias = affine_in[:, :-1] - affine_in[:, -1:], first.bias + first.weight @ norm.bias
    writer, writer_bias = compress_channels(second.weight.mT).mT, compress_channels(second.bias)
    z = compress_channels(x)
    found = z + F.linear(torch.relu(F.linear(CRMSNorm(7)(z), reader, reader_bias)), writer, writer_bias)
    close(found, expected.detach().numpy())


@pytest.mark.parametrize("norm", [RMSNorm(7), RMSNorm(7, has_weight=True).double(), CRMSNorm(8)], ids=str)
def test_gradients(norm: nn.Module) -> None:
    x = torch.tensor(draw(3, 5, 7, seed=7), requires_grad=True)
    parameters = dict(norm.named_parameters())

    def forward(x: Tensor, *values: Tensor) -> Tensor:
        y: Tensor = torch.func.functional_call(norm, dict(zip(parameters, values, strict=True)), (x,))
        return y

    assert torch.autograd.gradcheck(forward, (x, *parameters.values()))


@pytest.mark.parametrize("norm", [RMSNorm(7), CRMSNorm(8)], ids=str)
def test_half_precision_does_not_overflow(norm: nn.Module) -> None:
    x = torch.tensor(draw(3, 7, seed=8)).mul(1000).half()
    y = norm(x)
    assert y.dtype is torch.float16
    # float16 rounds once: half a unit in the last place of 11 bits.
    torch.testing.assert_close(y.double(), norm(x.double()), rtol=2**-11, atol=2**-24)


@pytest.mark.parametrize("norm", [RMSNorm(7), RMSNorm(7, has_weight=True), CRMSNorm(8)], ids=str)
def test_inference_is_exported_with_any_batch(norm: nn.Module) -> None:
    x = torch.tensor(draw(3, 5, 7, seed=9)).float()
    dynamic = ({0: torch.export.Dim("batch")},)
    exported = torch.export.export(norm.eval(), (x,), dynamic_shapes=dynamic, strict=False).module()
    torch.testing.assert_close(exported(x[:1]), norm(x[:1]), rtol=0, atol=0)


def test_checkpoint_keys() -> None:
    assert not RMSNorm(7).state_dict()
    assert not CRMSNorm(7).state_dict()
    assert {key: tuple(value.shape) for key, value in RMSNorm(7, has_weight=True).state_dict().items()} == {
        "weight": (7,)
    }


def test_one_channel_cannot_be_compressed() -> None:
    with pytest.raises(UsageError, match="1 channels without one leave nothing"):
        CRMSNorm(1)
