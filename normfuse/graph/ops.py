"""The ATen overloads that normfuse knows, by the names used everywhere else."""

from __future__ import annotations

import operator
from typing import Any, Final

import torch

__all__ = ["ATEN", "CONVOLUTIONS", "POINTWISE_KEEPING", "SPLITS", "VIEWS"]

ATEN: Final[Any] = torch.ops.aten

ADD: Final = ATEN.add.Tensor
SUB: Final = ATEN.sub.Tensor
RSUB: Final = ATEN.rsub.Scalar
MUL: Final = ATEN.mul.Tensor
DIV: Final = ATEN.div.Tensor
NEG: Final = ATEN.neg.default
LINEAR: Final = ATEN.linear.default
MATMUL: Final = ATEN.matmul.default
CONV1D: Final = ATEN.conv1d.default
CONV2D: Final = ATEN.conv2d.default
CONV3D: Final = ATEN.conv3d.default
CONV_TRANSPOSE1D: Final = ATEN.conv_transpose1d.default
CONV_TRANSPOSE2D: Final = ATEN.conv_transpose2d.input
CONV_TRANSPOSE3D: Final = ATEN.conv_transpose3d.input
CONVOLUTION: Final = ATEN.convolution.default
BATCH_NORM: Final = ATEN._native_batch_norm_legit_no_training.default
LAYER_NORM: Final = ATEN.layer_norm.default
SOFTMAX: Final = ATEN.softmax.int
ATTENTION: Final = ATEN.scaled_dot_product_attention.default
GELU: Final = ATEN.gelu.default
MEAN: Final = ATEN.mean.dim
RELU: Final = ATEN.relu.default
PERMUTE: Final = ATEN.permute.default
TRANSPOSE: Final = ATEN.transpose.int
T: Final = ATEN.t.default
RESHAPE: Final = ATEN.reshape.default
VIEW: Final = ATEN.view.default
FLATTEN: Final = ATEN.flatten.using_ints
UNSQUEEZE: Final = ATEN.unsqueeze.default
SELECT: Final = ATEN.select.int
SLICE: Final = ATEN.slice.Tensor
EXPAND: Final = ATEN.expand.default
CAT: Final = ATEN.cat.default
CLONE: Final = ATEN.clone.default
DROPOUT: Final = ATEN.dropout.default
GETITEM: Final = operator.getitem
PAD: Final = ATEN.pad.default
ROLL: Final = ATEN.roll.default
FLIP: Final = ATEN.flip.default
REPEAT: Final = ATEN.repeat.default
INDEX_SELECT: Final = ATEN.index_select.default
EMBEDDING: Final = ATEN.embedding.default
RMS_NORM: Final = ATEN.rms_norm.default
GROUP_NORM: Final = ATEN.group_norm.default
INSTANCE_NORM: Final = ATEN.instance_norm.default

CONVOLUTIONS: Final = {CONV1D: 1, CONV2D: 2, CONV3D: 3}
"""Convolution overloads and their number of spatial axes."""

TRANSPOSED_CONVOLUTIONS: Final = {CONV_TRANSPOSE1D: 1, CONV_TRANSPOSE2D: 2, CONV_TRANSPOSE3D: 3}

AVERAGE_POOLS: Final = {ATEN.avg_pool1d.default: 1, ATEN.avg_pool2d.default: 2, ATEN.avg_pool3d.default: 3}
"""Average pooling with windows, and its number of spatial axes."""

ADAPTIVE_AVERAGE_POOLS: Final = {
    ATEN.adaptive_avg_pool1d.default: 1,
    ATEN.adaptive_avg_pool2d.default: 2,
    ATEN.adaptive_avg_pool3d.default: 3,
}
"""Average pooling to a given size; nothing is padded."""

UPSAMPLINGS: Final = {
    ATEN.upsample_nearest1d.vec: 1,
    ATEN.upsample_nearest2d.vec: 2,
    ATEN.upsample_nearest3d.vec: 3,
    ATEN._upsample_nearest_exact2d.vec: 2,
    ATEN.upsample_linear1d.vec: 1,
    ATEN.upsample_bilinear2d.vec: 2,
    ATEN.upsample_trilinear3d.vec: 3,
    ATEN.upsample_bicubic2d.vec: 2,
}
"""Interpolations: the weights of every output position sum to one."""

MAXIMUM_POOLS: Final = {ATEN.max_pool1d.default: 1, ATEN.max_pool2d.default: 2, ATEN.max_pool3d.default: 3}
"""Maximum pooling; its padding is minus infinity."""

ONLINE_NORMS: Final = {LAYER_NORM: (2, 3), RMS_NORM: (2,), GROUP_NORM: (2, 3), INSTANCE_NORM: (1, 2)}
"""Norms that take their statistics from the current input, and the arguments of the gamma and beta that each applies
at no cost (RMS norm has no beta)."""

VIEWS: Final = frozenset({PERMUTE, TRANSPOSE, VIEW, RESHAPE})
"""Rearrangements of the same elements (after canonicalization: permute and reshape only)."""

SPLITS: Final = frozenset({ATEN.chunk.default, ATEN.split.Tensor, ATEN.split_with_sizes.default})
"""Operators that cut one axis into parts; ``getitem`` takes one of them."""

POINTWISE_KEEPING: Final = frozenset({CLONE, DROPOUT, ATEN.alias.default, ATEN.detach.default, ATEN.contiguous.default})
"""Operators that return their first argument unchanged in eval mode."""

KNOWN: Final = frozenset(
    {
        *(ADD, SUB, RSUB, MUL, DIV, NEG, LINEAR, MATMUL, BATCH_NORM, LAYER_NORM, SOFTMAX, ATTENTION, GELU, RELU, MEAN),
        *(
            PERMUTE,
            TRANSPOSE,
            T,
            RESHAPE,
            VIEW,
            FLATTEN,
            UNSQUEEZE,
            SELECT,
            SLICE,
            EXPAND,
            CAT,
            CLONE,
            DROPOUT,
            GETITEM,
        ),
        *CONVOLUTIONS,
        *(
            ATEN.chunk.default,
            ATEN.split.Tensor,
            ATEN.split_with_sizes.default,
            ATEN.unbind.int,
            ATEN.embedding.default,
        ),
        *(ATEN.max_pool2d.default, ATEN.avg_pool2d.default, ATEN.adaptive_avg_pool2d.default, ATEN.mean.default),
        *(ATEN.tanh.default, ATEN.sigmoid.default, ATEN.silu.default, ATEN.hardtanh.default, ATEN.hardswish.default),
    }
)
"""Operators that reports need not mention: they have integer kernels, carry codes along, or are float by design."""
