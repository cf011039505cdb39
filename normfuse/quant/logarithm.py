"""Codes on a logarithmic scale, for what softmax makes: many small values, few near one.

    value = scale * 2^(-code / per_octave)          the last code stands for 0 where ``top_is_zero``

With one code per octave this is the log2 quantizer of FQ-ViT (Lin et al. 2022, arXiv 2111.13824), with two the
log-sqrt-2 quantizer of RepQ-ViT (Li et al., 2022, arXiv 2212.08254). A value gets the nearest value that has a code,
not the nearest logarithm (ours): that is where the squared error is least. Simulation only: no runtime that normfuse
writes for multiplies such codes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import Tensor

from normfuse.errors import UsageError
from normfuse.quant.granularity import PER_TENSOR, PerChannel, PerTensor
from normfuse.quant.integer_type import IntegerType, smallest_container
from normfuse.quant.parameters import SMALLEST_SCALE

__all__ = [
    "LogarithmicParams",
    "dequantize_logarithm",
    "logarithmic_levels",
    "logarithmic_params",
    "nearest_levels",
    "quantize_logarithm",
]

SCALES: Final = torch.exp2(-torch.arange(96) / 16)
"""Fractions of the largest value that are tried as scale: six octaves, 4 % apart."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LogarithmicParams:
    """The map ``real = scale * 2^(-code / per_octave)`` of one tensor that is not negative.

    Attributes:
        scale: float32, positive; shape [] per tensor, [channels] per channel.
        per_octave: how many codes halve the value.
        type: the range of the codes, unsigned.
        top_is_zero: whether the last code stands for 0.
        granularity: which axis the channels are on, if any.

    Raises:
        UsageError: one of the above does not hold.
    """

    scale: Tensor
    per_octave: int
    type: IntegerType
    top_is_zero: bool
    granularity: PerTensor | PerChannel = PER_TENSOR

    def __post_init__(self) -> None:
        if self.type.signed or self.per_octave < 1:
            raise UsageError(
                f"logarithmic codes of {self.type}, {self.per_octave} per octave", expected="unsigned, 1 or more"
            )
        if self.scale.dtype != torch.float32 or not self.granularity.fits(self.scale.shape):
            raise UsageError(
                f"scale of {self.scale.dtype} and shape {list(self.scale.shape)}",
                expected=f"float32 of a shape that fits {self.granularity}",
            )
        if not bool((torch.isfinite(self.scale) & (self.scale >= SMALLEST_SCALE)).all()):
            raise UsageError("a scale that is not a positive normal float32", expected=f"{SMALLEST_SCALE} or more")

    @property
    def levels(self) -> Tensor:
        """What the codes stand for, over the scale: [codes], float32, falling from 1."""
        return logarithmic_levels(self.type.levels, self.per_octave, self.top_is_zero)


def logarithmic_levels(count: int, per_octave: int, top_is_zero: bool) -> Tensor:
    """Return ``2^(-code / per_octave)`` for codes 0 ... count - 1, float32; 0 for the last one if asked for."""
    levels = torch.exp2(-torch.arange(count, dtype=torch.float64) / per_octave)
    if top_is_zero:
        levels[-1] = 0
    return levels.float()


def nearest_levels(x: Tensor, levels: Tensor) -> Tensor:
    """Return, per value, which of the falling ``levels`` is nearest: int64 codes; a tie gives the smaller value."""
    rising = levels.to(x.device, x.dtype).flip(0)
    between = (rising[1:] + rising[:-1]) / 2
    return (len(levels) - 1) - torch.bucketize(x.contiguous(), between)


def quantize_logarithm(x: Tensor, scale: Tensor, axis: int, count: int, per_octave: int, top_is_zero: bool) -> Tensor:
    """Return the codes of ``x``, in the smallest type that holds ``count`` of them; below zero is as zero.

    Args:
        x: float32 or float64, any shape.
        scale: x's type and device, positive; shape [] with axis -1, else [x.shape[axis]].
        axis: the channel axis, or -1 for one scale per tensor.
        count: how many codes there are.
        per_octave: how many of them halve the value.
        top_is_zero: whether the last one stands for 0.
    """
    steps = x / _on(axis).spread(scale, x.shape)
    codes = nearest_levels(steps, logarithmic_levels(count, per_octave, top_is_zero))
    return codes.to(smallest_container(0, count - 1))


def dequantize_logarithm(
    codes: Tensor, scale: Tensor, axis: int, count: int, per_octave: int, top_is_zero: bool
) -> Tensor:
    """Return the values of ``codes``, in the scale's type; the arguments are those of ``quantize_logarithm``."""
    levels = logarithmic_levels(count, per_octave, top_is_zero).to(codes.device, scale.dtype)
    return levels[codes.long()] * _on(axis).spread(scale, codes.shape)


def logarithmic_params(
    x: Tensor, type: IntegerType, *, per_octave: int, granularity: PerTensor | PerChannel = PER_TENSOR
) -> LogarithmicParams:
    """Return the parameters of least squared error on ``x``.

    Every scale of ``SCALES`` is tried with the last code at zero and without. Channels choose their scales alone and
    the meaning of the last code together.
    """
    axis = granularity.axis if isinstance(granularity, PerChannel) else None
    rows = x.reshape(1, -1) if axis is None else x.movedim(axis, 0).flatten(1)
    found = [_searched(rows, type, per_octave, top_is_zero) for top_is_zero in (True, False)]
    _, params = min(found, key=lambda pair: float(pair[0].sum()))
    if axis is None:
        return replace(params, scale=params.scale[0], granularity=PER_TENSOR)
    return replace(params, granularity=granularity)


def _on(axis: int) -> PerTensor | PerChannel:
    return PER_TENSOR if axis == -1 else PerChannel(axis)


def _searched(rows: Tensor, type: IntegerType, per_octave: int, top_is_zero: bool) -> tuple[Tensor, LogarithmicParams]:
    """Return the least squared error of each row, [rows] float64, and the parameters that have it."""
    levels = logarithmic_levels(type.levels, per_octave, top_is_zero)
    best, error = _largest(rows), torch.full((len(rows),), torch.inf, dtype=torch.float64)
    for scale in _scales(rows):
        values = levels[nearest_levels(rows / scale[:, None], levels)] * scale[:, None]
        found = (values - rows).square().sum(1, dtype=torch.float64)
        best, error = torch.where(found < error, scale, best), torch.minimum(found, error)
    params = LogarithmicParams(
        scale=best, per_octave=per_octave, type=type, top_is_zero=top_is_zero, granularity=PerChannel(0)
    )
    return error, params


def _scales(rows: Tensor) -> Iterator[Tensor]:
    largest = _largest(rows)
    return ((largest * fraction).clamp(min=SMALLEST_SCALE) for fraction in SCALES)


def _largest(rows: Tensor) -> Tensor:
    """Return the largest value of each row; 1 where there is none above zero."""
    largest = rows.detach().float().amax(1)
    return torch.where(largest > SMALLEST_SCALE, largest, 1.0)
