"""The ATen overloads that normfuse knows, by the names used everywhere else."""

from __future__ import annotations

import operator
from typing import Any, Final

import torch

__all__ = ["ATEN", "CONVOLUTIONS", "POINTWISE_KEEPING", "SELECTIONS", "SPLITS", "VIEWS"]

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

CONVOLUTIONS: Final = {CONV1D: 1, CONV2D: 2, CONV3D: 3}
"""Convolution overloads and their number of spatial axes."""

TRANSPOSED_CONVOLUTIONS: Final = {CONV_TRANSPOSE1D: 1, CONV_TRANSPOSE2D: 2, CONV_TRANSPOSE3D: 3}

VIEWS: Final = frozenset({PERMUTE, TRANSPOSE, VIEW, RESHAPE})
"""Rearrangements of the same elements (after canonicalization: permute and reshape only)."""

SELECTIONS: Final = frozenset({SELECT, SLICE})
"""Operators that keep some positions of one axis."""

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
