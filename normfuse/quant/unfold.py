"""The inputs of a convolution as the rows of a linear map."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["unfold_rows"]


def unfold_rows(
    x: Tensor,
    kernel: Sequence[int],
    *,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int = 1,
) -> Tensor:
    """Return what every output position reads: ``convolution(x, W) == rows @ W.flatten(1).T`` within a group.

    For a 1x1 kernel without stride and padding they are x's pixels. Padding reads zeros.

    Args:
        x: any type, [batch, channels, *extents].
        kernel: the kernel's extents, one per spatial axis, as all that follow.
        stride: steps between windows.
        padding: zeros on both sides.
        dilation: steps between taps.
        groups: the convolution's groups.

    Returns:
        [groups, batch * positions, channels / groups * taps], in the order of a weight's axes behind the first.
    """
    axes = len(kernel)
    windows = torch.nn.functional.pad(x, [extent for extent in reversed(padding) for _ in range(2)])
    for axis, (taps, step, spacing) in enumerate(zip(kernel, stride, dilation, strict=True), start=2):
        windows = windows.unfold(axis, (taps - 1) * spacing + 1, step)[..., ::spacing]
    grouped = windows.reshape(x.shape[0], groups, x.shape[1] // groups, *windows.shape[2:])
    positions, taps_axes = range(3, 3 + axes), range(3 + axes, 3 + 2 * axes)
    ordered = grouped.permute(1, 0, *positions, 2, *taps_axes)
    return ordered.flatten(2 + axes).flatten(1, -2)
