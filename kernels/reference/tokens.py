"""A norm in front of linear maps, with codes of one scale per token: it leaves the codes alone and makes one factor.

With d a token's channels (less their mean in a layer norm) and r the root of their mean square,

    W (d / r) = W (127 d / max |d|) * (max |d| / r) / 127

Whatever r is, the codes 127 d / max |d| are the same: the norm is one factor per token behind the product. Exact in
real arithmetic for any eps, since with it r is one number per token still (ours).
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from normfuse.kernels.reference.norms import deviations, over_root, power
from normfuse.kernels.reference.products import linear_sums
from normfuse.kernels.reference.rescaling import rescale, rounded_shift
from normfuse.kernels.reference.tables import int_table

__all__ = ["LARGEST", "int_linear_tokens", "int_linear_tokens_table", "int_token_codes", "int_token_factors"]

LARGEST: Final = 127
"""The code of a token's largest magnitude."""


def int_token_codes(x: Tensor, is_centred: bool) -> Tensor:
    """Return int8 codes -127 ... 127 of every token at a scale of its own, rounded to the nearest, halves up.

    A token of nothing but 0 (or of one number, if ``is_centred``) has the codes 0.

    Args:
        x: int8 or int16 [..., channels], zero point 0; 2^14 channels at most.
        is_centred: whether a token's mean is taken off first, as a layer norm does; an RMS norm does not.
    """
    away = deviations(x, is_centred=is_centred)
    largest = away.abs().amax(-1, keepdim=True).clamp(min=1)
    return torch.div(2 * LARGEST * away + largest, 2 * largest, rounding_mode="floor").to(torch.int8)


def int_token_factors(x: Tensor, epsilon: int, is_centred: bool) -> Tensor:
    """Return what 127 stands for in every token of the norm of ``x``: int32 [..., 1], with 20 bits behind the point.

    None is above ``sqrt(channels)``.

    Args:
        x: as for ``int_token_codes``.
        epsilon: as for ``int_layer_norm``.
        is_centred: whether it is a layer norm; else it is an RMS norm.
    """
    largest = deviations(x, is_centred=is_centred).abs().amax(-1, keepdim=True)
    return over_root(largest, power(x, epsilon, is_centred=is_centred)).to(torch.int32)


def int_linear_tokens(
    x: Tensor,
    factors: Tensor,
    weight: Tensor,
    bias: Tensor,
    multiplier: Tensor,
    token_shift: int,
    shift: int,
    zero_point: int,
    minimum: int,
    maximum: int,
) -> Tensor:
    """Return the codes of ``norm(x) W^T + b``, from the codes and factors of tokens.

    Args:
        x: int8 [..., in], from ``int_token_codes``.
        factors: int32 [..., 1], from ``int_token_factors``.
        weight: int8 [out, in].
        bias: int32 [out], at the scale of the sums times factors over 2^token_shift.
        multiplier: int32 [out], from that scale to the result's, see ``rescale``.
        token_shift: brings a sum times its factor below 2^29; 1 or more.
        shift: see ``rescale``.
        zero_point: see ``rescale``.
        minimum: see ``rescale``.
        maximum: see ``rescale``.
    """
    sums = rounded_shift(linear_sums(x, weight) * factors.to(torch.int64), token_shift)
    return rescale(sums, bias, multiplier, shift, zero_point, minimum, maximum)


def int_linear_tokens_table(
    x: Tensor,
    factors: Tensor,
    weight: Tensor,
    bias: Tensor,
    multiplier: Tensor,
    table: Tensor,
    token_shift: int,
    shift: int,
    zero_point: int,
) -> Tensor:
    """Return ``int_table(int_linear_tokens(...), table)``.

    Args:
        x: as for ``int_linear_tokens``.
        factors: as for ``int_linear_tokens``.
        weight: as for ``int_linear_tokens``.
        bias: as for ``int_linear_tokens``.
        multiplier: as for ``int_linear_tokens``.
        table: int8 or int16 [256], for the codes -128 ... 127.
        token_shift: as for ``int_linear_tokens``.
        shift: see ``rescale``.
        zero_point: see ``rescale``.
    """
    codes = int_linear_tokens(x, factors, weight, bias, multiplier, token_shift, shift, zero_point, -128, 127)
    return int_table(codes, table)
