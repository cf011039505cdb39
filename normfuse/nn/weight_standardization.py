"""Weight standardization: a convolution whose filters have mean zero and deviation one."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import assert_never

import torch
from torch import Tensor, nn

from normfuse.errors import UsageError

__all__ = ["Deviation", "StandardizedConv2d", "standardize_convs", "standardize_weight"]


class Deviation(Enum):
    """What a filter is divided by; both are published, and checkpoints of one do not fit the other."""

    EPS_OUTSIDE = "std(W) + eps"  # the layer of the first paper
    EPS_INSIDE = "sqrt(var(W) + eps)"  # the ImageNet models with batch-channel normalization


def standardize_weight(weight: Tensor, *, deviation: Deviation = Deviation.EPS_OUTSIDE, eps: float = 1e-5) -> Tensor:
    """Return ``weight`` (out, ...) with each filter centred and divided by its deviation, which is unbiased."""
    filters = weight.flatten(1)
    centred = weight - filters.mean(dim=1).reshape(-1, *[1] * (weight.ndim - 1))
    match deviation:
        case Deviation.EPS_OUTSIDE:
            divisor = filters.std(dim=1) + eps
        case Deviation.EPS_INSIDE:
            divisor = torch.sqrt(filters.var(dim=1) + eps)
        case _:
            assert_never(deviation)
    return centred / divisor.reshape(-1, *[1] * (weight.ndim - 1))


class StandardizedConv2d(nn.Conv2d):
    """The given convolution with its filters standardized in every forward.

    "Micro-Batch Training with Batch-Channel Normalization and Weight Standardization" (Qiao et al., 2019, arXiv
    1903.10520). Each filter W_o, over (channels / groups, height, width), becomes ``(W_o - mean) / deviation``, with
    the variance over n - 1 in both forms of `Deviation`. The scale of a filter is lost: meant before a norm. At
    inference the standardized weight is a constant and the layer is a plain convolution.

    The parameters are those of the given convolution, not copies, under the same names; only they are in the
    checkpoint, so ``deviation`` and ``eps`` have to be known when one is loaded.

    Args:
        conv: the convolution; not to be used beside this one.
        deviation: what to divide by.
        eps: added to the deviation or to the variance.

    Raises:
        UsageError: a filter of one weight has no deviation.
    """

    def __init__(self, conv: nn.Conv2d, *, deviation: Deviation = Deviation.EPS_OUTSIDE, eps: float = 1e-5) -> None:
        if conv.weight[0].numel() < 2:
            raise UsageError(
                "a filter of one weight cannot be standardized",
                where=f"StandardizedConv2d({conv})",
                expected="at least two weights per filter",
                hint="leave this convolution as it is",
            )
        super().__init__(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,  # type: ignore[arg-type]  # torch keeps a longer tuple type than it takes
            stride=conv.stride,  # type: ignore[arg-type]
            padding=conv.padding,  # type: ignore[arg-type]
            dilation=conv.dilation,  # type: ignore[arg-type]
            groups=conv.groups,
            bias=conv.bias is not None,
            padding_mode=conv.padding_mode,
            device="meta",  # the parameters are given: nothing to allocate, no random numbers to use up
        )
        self.deviation, self.eps = deviation, eps
        self.weight, self.bias = conv.weight, conv.bias
        self.train(conv.training)

    def extra_repr(self) -> str:
        """Return the options, for ``print(model)``."""
        inherited = super().extra_repr()  # type: ignore[no-untyped-call]
        return f"{inherited}, deviation={self.deviation.value}, eps={self.eps}"

    def forward(self, x: Tensor) -> Tensor:
        """Return the convolution of ``x`` (batch, channels, height, width)."""
        weight = standardize_weight(self.weight, deviation=self.deviation, eps=self.eps)
        y: Tensor = self._conv_forward(x, weight, self.bias)
        return y


def standardize_convs(
    model: nn.Module,
    *,
    deviation: Deviation = Deviation.EPS_OUTSIDE,
    eps: float = 1e-5,
    only: Callable[[str, nn.Conv2d], bool] = lambda path, conv: True,
) -> list[str]:
    """Replace every ``nn.Conv2d`` by a `StandardizedConv2d` with its parameters, in place.

    Subclasses are left alone. A convolution that stands at several paths stays one.

    Args:
        model: any module that holds convolutions (a model that is itself one cannot be changed in place).
        deviation: what to divide by.
        eps: added to the deviation or to the variance.
        only: tells from path and convolution whether to replace it, such as those before a norm.

    Returns:
        The module paths that were replaced, in the model's order.

    Raises:
        UsageError: a filter of one weight has no deviation.
    """
    found = [
        (path, module)
        for path, module in model.named_modules(remove_duplicate=False)
        if path and type(module) is nn.Conv2d and only(path, module)
    ]
    made = {
        conv: StandardizedConv2d(conv, deviation=deviation, eps=eps)
        for conv in dict.fromkeys(conv for _, conv in found)
    }
    for path, conv in found:
        owner, _, name = path.rpartition(".")
        setattr(model.get_submodule(owner), name, made[conv])
    return [path for path, _ in found]
