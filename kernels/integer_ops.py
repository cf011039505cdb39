"""Defines the integer operators among ``torch.ops.normfuse.*``; importing this module is enough.

What they compute is written in ``normfuse.kernels.reference``, with types, widths and shapes. Their schemas are those
of its functions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import functional

from normfuse.kernels import reference
from normfuse.kernels.reference.rescaling import codes_type

__all__ = [
    "INTEGER_OPERATORS",
    "INT_ADD",
    "INT_ATTENTION",
    "INT_CONV2D",
    "INT_CONV2D_ADD",
    "INT_INTERPOLATE",
    "INT_LAYER_NORM",
    "INT_LINEAR",
    "INT_LINEAR_ADD",
    "INT_LINEAR_TABLE",
    "INT_LINEAR_TOKENS",
    "INT_LINEAR_TOKENS_TABLE",
    "INT_MATMUL",
    "INT_MEAN",
    "INT_MULTIPLY",
    "INT_RMS_NORM",
    "INT_TABLE",
    "INT_TOKEN_CODES",
    "INT_TOKEN_FACTORS",
    "LAMBDA_SHIFT_GELU",
    "REQUANTIZE",
    "SHIFTMAX",
    "SHIFT_GELU",
]


def _requantized(x: Tensor, bias: Tensor, multiplier: Tensor, *numbers: int) -> Tensor:
    return _codes(_broadcast(x, bias, multiplier), x, numbers[-2:])


def _added(x: Tensor, y: Tensor, *numbers: int) -> Tensor:
    return _codes(_broadcast(x, y), x, numbers[-2:])


def _mean(x: Tensor, axes: Sequence[int], keeps_axes: bool, *numbers: int) -> Tensor:
    return torch.empty_like(x, dtype=torch.int64).sum(list(axes), keepdim=keeps_axes).to(codes_type(*numbers[-2:]))


def _linear(x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    return _codes((*x.shape[:-1], weight.shape[0]), x, rest[-2:])


def _linear_table(x: Tensor, weight: Tensor, bias: Tensor, multiplier: Tensor, table: Tensor, *rest: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=table.dtype)


def _linear_tokens(x: Tensor, factors: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    return _codes((*x.shape[:-1], weight.shape[0]), x, rest[-2:])


def _linear_tokens_table(
    x: Tensor, factors: Tensor, weight: Tensor, bias: Tensor, multiplier: Tensor, table: Tensor, *rest: int
) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=table.dtype)


def _token_codes(x: Tensor, is_centred: bool) -> Tensor:
    return x.new_empty(x.shape, dtype=torch.int8)


def _token_factors(x: Tensor, epsilon: int, is_centred: bool) -> Tensor:
    return x.new_empty((*x.shape[:-1], 1), dtype=torch.int32)


def _conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    multiplier: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    *numbers: int,
) -> Tensor:
    like = functional.conv2d(
        torch.empty_like(x, dtype=torch.float32),
        torch.empty_like(weight, dtype=torch.float32),
        None,
        list(stride),
        list(padding),
        list(dilation),
        groups,
    )
    return torch.empty_like(like, dtype=codes_type(*numbers[-2:]))


def _conv2d_add(x: Tensor, weight: Tensor, bias: Tensor, multiplier: Tensor, residual: Tensor, *rest: Any) -> Tensor:
    return _conv2d(x, weight, bias, multiplier, *rest)


def _matmul(x: Tensor, y: Tensor, *numbers: int) -> Tensor:
    return torch.empty_like(_product(x, y), dtype=codes_type(*numbers[-2:]))


def _attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, *numbers: int) -> Tensor:
    return torch.empty_like(_product(_product(q, k), v), dtype=codes_type(*numbers[-2:]))


def _product(x: Tensor, y: Tensor) -> Tensor:
    return torch.empty_like(x, dtype=torch.float32) @ torch.empty_like(y, dtype=torch.float32)


def _norm(x: Tensor, bias: Tensor, multiplier: Tensor, *numbers: int) -> Tensor:
    return _codes(x.shape, x, numbers[-2:])


def _elementwise(x: Tensor, *numbers: int) -> Tensor:
    return _codes(x.shape, x, numbers[-2:])


def _table(x: Tensor, table: Tensor) -> Tensor:
    return torch.empty_like(x, dtype=table.dtype)


def _broadcast(*tensors: Tensor) -> Sequence[int]:
    return sum(torch.empty_like(each, dtype=torch.int64) for each in tensors).shape  # type: ignore[union-attr]


def _interpolated(x: Tensor, low: Tensor, high: Tensor, weight: Tensor, axis: int) -> Tensor:
    return x.new_empty((*x.shape[:axis], low.shape[0], *x.shape[axis + 1 :]))


def _codes(shape: Sequence[int], x: Tensor, ends: Sequence[int]) -> Tensor:
    return x.new_empty(shape, dtype=codes_type(*ends))


_DEFINITIONS: Final[Mapping[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]]] = {
    "requantize": (reference.rescale, _requantized),
    "int_add": (reference.int_add, _added),
    "int_multiply": (reference.int_multiply, _added),
    "int_mean": (reference.int_mean, _mean),
    "int_linear": (reference.int_linear, _linear),
    "int_linear_add": (reference.int_linear_add, _linear),
    "int_linear_table": (reference.int_linear_table, _linear_table),
    "int_token_codes": (reference.int_token_codes, _token_codes),
    "int_token_factors": (reference.int_token_factors, _token_factors),
    "int_linear_tokens": (reference.int_linear_tokens, _linear_tokens),
    "int_linear_tokens_table": (reference.int_linear_tokens_table, _linear_tokens_table),
    "int_conv2d": (reference.int_conv2d, _conv2d),
    "int_conv2d_add": (reference.int_conv2d_add, _conv2d_add),
    "int_matmul": (reference.int_matmul, _matmul),
    "int_attention": (reference.int_attention, _attention),
    "int_layer_norm": (reference.int_layer_norm, _norm),
    "int_rms_norm": (reference.int_rms_norm, _norm),
    "int_interpolate": (reference.int_interpolate, _interpolated),
    "int_table": (reference.int_table, _table),
    "shiftmax": (reference.shiftmax, _elementwise),
    "shift_gelu": (reference.shift_gelu, _elementwise),
    "lambda_shift_gelu": (reference.lambda_shift_gelu, _elementwise),
}
"""By name, what an operator computes and the shape of its result."""


def _define() -> None:
    if hasattr(torch.ops.normfuse, "requantize"):  # a reload would make operators that older graphs do not know
        return
    for name, (compute, shape) in _DEFINITIONS.items():
        torch.library.custom_op(f"normfuse::{name}", compute, mutates_args=()).register_fake(shape)


_define()

INTEGER_OPERATORS: Final[Mapping[str, Any]] = {name: getattr(torch.ops.normfuse, name).default for name in _DEFINITIONS}
REQUANTIZE: Final = INTEGER_OPERATORS["requantize"]
INT_ADD: Final = INTEGER_OPERATORS["int_add"]
INT_MULTIPLY: Final = INTEGER_OPERATORS["int_multiply"]
INT_MEAN: Final = INTEGER_OPERATORS["int_mean"]
INT_LINEAR: Final = INTEGER_OPERATORS["int_linear"]
INT_LINEAR_ADD: Final = INTEGER_OPERATORS["int_linear_add"]
INT_LINEAR_TABLE: Final = INTEGER_OPERATORS["int_linear_table"]
INT_TOKEN_CODES: Final = INTEGER_OPERATORS["int_token_codes"]
INT_TOKEN_FACTORS: Final = INTEGER_OPERATORS["int_token_factors"]
INT_LINEAR_TOKENS: Final = INTEGER_OPERATORS["int_linear_tokens"]
INT_LINEAR_TOKENS_TABLE: Final = INTEGER_OPERATORS["int_linear_tokens_table"]
INT_CONV2D: Final = INTEGER_OPERATORS["int_conv2d"]
INT_CONV2D_ADD: Final = INTEGER_OPERATORS["int_conv2d_add"]
INT_MATMUL: Final = INTEGER_OPERATORS["int_matmul"]
INT_ATTENTION: Final = INTEGER_OPERATORS["int_attention"]
INT_LAYER_NORM: Final = INTEGER_OPERATORS["int_layer_norm"]
INT_RMS_NORM: Final = INTEGER_OPERATORS["int_rms_norm"]
INT_INTERPOLATE: Final = INTEGER_OPERATORS["int_interpolate"]
INT_TABLE: Final = INTEGER_OPERATORS["int_table"]
SHIFTMAX: Final = INTEGER_OPERATORS["shiftmax"]
SHIFT_GELU: Final = INTEGER_OPERATORS["shift_gelu"]
LAMBDA_SHIFT_GELU: Final = INTEGER_OPERATORS["lambda_shift_gelu"]
