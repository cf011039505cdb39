"""A bias that gives back the mean error of quantized weights and inputs."""

from __future__ import annotations

from torch import Tensor

__all__ = ["corrected_bias"]


def corrected_bias(
    bias: Tensor | None, weight: Tensor, quantized: Tensor, *, mean_quantized: Tensor, mean_float: Tensor
) -> Tensor:
    """Return ``b + W E[x_f] - Q E[x_q]``: the outputs then have the mean of the float model's.

    Source: Nagel et al. 2019 (arXiv 1906.04721), section 4.2, with the error of the inputs beside that of the weights.

    Args:
        bias: [out], or None for zeros.
        weight: the float weight, [out, ...].
        quantized: the values that its codes stand for, of the same shape.
        mean_quantized: the mean of the inputs that the quantized layer sees, [groups, K].
        mean_float: that of the float model's.

    Returns:
        float64 [out].
    """
    groups = mean_float.shape[0]
    device = mean_float.device
    shape = (groups, -1, mean_float.shape[1])
    wanted = weight.detach().to(device).double().reshape(shape) @ mean_float.double()[:, :, None]
    given = quantized.detach().to(device).double().reshape(shape) @ mean_quantized.double()[:, :, None]
    error = (wanted - given).flatten()
    return error if bias is None else error + bias.detach().to(device).double()
