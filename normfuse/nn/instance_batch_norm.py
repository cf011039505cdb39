"""IBN-a: instance norm for the first channels, batch norm, which folds, for the rest."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from normfuse.errors import UsageError

__all__ = ["IBN"]


class IBN(nn.Module):
    """Instance norm of the first channels of (batch, channels, height, width), batch norm of the others.

    "Two at Once: Enhancing Learning and Generalization Capacities via IBN-Net" (Pan et al., 2018, arXiv 1807.09441),
    the IBN-a of its blocks. The instance norm has no running statistics and stays at inference; the batch norm is a
    constant affine then and folds into the rows of the convolution that make its channels.

    The names are those of the authors' checkpoints. Their code cuts the channels into pieces of the first part's
    size and takes two of them, which is right where these are the halves; here the second part is the rest, whatever
    ratio and number of channels.

    Args:
        channels: size of axis 1.
        ratio: share of the instance norm, ``int(channels * ratio)`` channels.
        eps: added to the variances.

    Raises:
        UsageError: one of the parts would be empty.
    """

    def __init__(self, channels: int, *, ratio: float = 0.5, eps: float = 1e-5) -> None:
        super().__init__()
        first = int(channels * ratio)
        if not 0 < first < channels:
            raise UsageError(
                f"ratio {ratio} of {channels} channels leaves one part empty",
                where="IBN",
                expected="at least one channel of each kind",
                hint="another ratio, or nn.InstanceNorm2d or nn.BatchNorm2d alone",
            )
        self.IN = nn.InstanceNorm2d(first, eps=eps, affine=True)
        self.BN = nn.BatchNorm2d(channels - first, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` (batch, channels, height, width) normalized."""
        first, rest = torch.split(x, [self.IN.num_features, self.BN.num_features], dim=1)
        return torch.cat((self.IN(first), self.BN(rest)), dim=1)
