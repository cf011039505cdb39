"""Random statistics for models with random weights: fresh norms would be identities, and a wrong fold would pass."""

from __future__ import annotations

import torch
from torch import nn

__all__ = ["randomized_norms"]


def randomized_norms(model: nn.Module, *, seed: int = 0) -> nn.Module:
    """Give every norm's scale, shift and statistics a random value, in place; return the model in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 and name.endswith("weight"):
                parameter.copy_(torch.rand(parameter.shape, generator=generator) + 0.5)
            elif parameter.ndim == 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
        for name, buffer in model.named_buffers():
            if name.endswith("running_var"):
                buffer.copy_(torch.rand(buffer.shape, generator=generator) * 1.5 + 0.5)
            elif name.endswith("running_mean"):
                buffer.copy_(torch.randn(buffer.shape, generator=generator) * 0.1)
    return model.eval()
