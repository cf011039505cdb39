"""A layer with inputs that go together, as those of networks do."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from normfuse.quant import InputMoments, QuantParams, dequantize


@dataclass(frozen=True)
class Layer:
    """Correlated inputs, those of the float model, and a weight [out, K]."""

    x: Tensor
    x_float: Tensor
    weight: Tensor

    @property
    def moments(self) -> InputMoments:
        moments = InputMoments(self.x.shape[1])
        moments.update(self.x, self.x_float)
        return moments

    def squared_error(self, codes: Tensor, params: QuantParams) -> Tensor:
        """Return the squared error of every output, from the inputs."""
        values = dequantize(codes, params).double()
        return (self.x.double() @ values.mT - self.x_float.double() @ self.weight.double().mT).square().sum(dim=0)


def correlated_layer(seed: int, *, out: int = 5, inputs: int = 13, rows: int = 60, drift: float = 0.1) -> Layer:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(inputs, inputs, generator=generator) * torch.exp(torch.randn(inputs, generator=generator))
    x_float = torch.randn(rows, inputs, generator=generator) @ mixing
    x = x_float + drift * torch.randn(rows, inputs, generator=generator)
    return Layer(x, x_float, torch.randn(out, inputs, generator=generator))
