from __future__ import annotations

import importlib
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from normfuse.errors import UsageError
from normfuse.kernels import ops, reference
from normfuse.kernels.ops import DEQUANTIZE, DEQUANTIZE_LOGARITHM, GROUPED_LINEAR, QUANTIZE, QUANTIZE_LOGARITHM
from normfuse.quant import DynamicParams, round_rows

LIMITS = [(0, 255), (-128, 127), (-127, 127), (0, 15), (-8, 7), (-32768, 32767)]
NO_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, NO_CUDA])]


def _arguments(axis: int, limits: tuple[int, int], dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(3, 5, 7, generator=generator, dtype=dtype)
    shape = [] if axis < 0 else [x.shape[axis]]
    scale = torch.rand(shape, generator=generator, dtype=dtype) * 4 / (limits[1] - limits[0]) + 0.001
    zero_point = torch.randint(limits[0], limits[1] + 1, shape, generator=generator, dtype=torch.int32)
    return x, scale, zero_point, axis, *limits


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("axis", [-1, 0, 1, 2])
@pytest.mark.parametrize("limits", LIMITS[:2])
def test_operators_satisfy_torch(axis: int, limits: tuple[int, int], dtype: torch.dtype) -> None:
    arguments = _arguments(axis, limits, dtype)
    torch.library.opcheck(QUANTIZE, arguments)
    torch.library.opcheck(DEQUANTIZE, (QUANTIZE(*arguments), *arguments[1:4]))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("axis", [-1, 1])
@pytest.mark.parametrize("limits", LIMITS)
def test_operators_are_the_reference(axis: int, limits: tuple[int, int], device: str) -> None:
    arguments = _arguments(axis, limits)
    moved = [value.to(device) if isinstance(value, Tensor) else value for value in arguments]
    codes, expected = QUANTIZE(*moved), reference.quantize(*arguments)
    values = DEQUANTIZE(codes, *moved[1:4])
    assert torch.equal(codes.cpu(), expected)
    assert torch.equal(values.cpu(), reference.dequantize(expected, *arguments[1:4]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dequantize_has_the_type_of_the_scale_and_takes_int32(dtype: torch.dtype) -> None:
    codes = torch.tensor([[-(2**31), 3], [2**31 - 1, -1]], dtype=torch.int32)
    scale = torch.tensor([2.0**-20, 0.5], dtype=dtype)
    values = DEQUANTIZE(codes, scale, torch.zeros(2, dtype=torch.int32), 1)
    assert values.dtype == dtype
    assert torch.equal(values, codes.to(dtype) * scale)


def test_operators_say_what_does_not_fit() -> None:
    with pytest.raises(UsageError, match="channel axis 3"):
        QUANTIZE(torch.zeros(2, 2, 2), torch.ones(2), torch.zeros(2, dtype=torch.int32), 3, 0, 255)


def test_schemas_are_the_documented_ones() -> None:
    assert ops.__doc__ is not None
    documented = " ".join(ops.__doc__.split())
    for operator in (QUANTIZE, DEQUANTIZE, QUANTIZE_LOGARITHM, DEQUANTIZE_LOGARITHM):
        assert str(operator._schema).replace("SymInt", "int") in documented


def test_defining_them_again_changes_nothing() -> None:
    importlib.reload(ops)
    assert torch.ops.normfuse.quantize.default is ops.QUANTIZE is QUANTIZE
    assert torch.ops.normfuse.dequantize.default is ops.DEQUANTIZE is DEQUANTIZE


class _Pair(nn.Module):
    def forward(self, x: Tensor, scale: Tensor, zero_point: Tensor) -> tuple[Tensor, Tensor]:
        codes = torch.ops.normfuse.quantize(x, scale, zero_point, 2, 0, 255)
        return codes, torch.ops.normfuse.dequantize(codes, scale, zero_point, 2)


def test_export_keeps_them_whole_with_a_dynamic_batch() -> None:
    x, scale, zero_point, *_ = _arguments(2, (0, 255))
    batch = torch.export.Dim("batch", min=1, max=99)
    program = torch.export.export(_Pair(), (x, scale, zero_point), dynamic_shapes=({0: batch}, {}, {}))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own deprecation warnings
        decomposed = program.run_decompositions()
    called = [node.target for node in decomposed.graph.nodes if node.op == "call_function"]
    assert called == [QUANTIZE, DEQUANTIZE]
    longer = torch.cat([x, x, x[:1]])
    for ours, theirs in zip(
        program.module()(longer, scale, zero_point), _Pair()(longer, scale, zero_point), strict=True
    ):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("has_zero_points", [True, False])
@pytest.mark.parametrize(
    ("inputs", "size", "rounds"), [(12, 4, False), (10, 4, False), (5, 16, False), (12, 4, True), (96, 32, True)]
)
def test_a_grouped_product_is_the_product_with_the_weight(
    inputs: int, size: int, rounds: bool, has_zero_points: bool, has_bias: bool
) -> None:
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(2, 3, inputs, generator=generator)
    codes = torch.randint(-8, 8, (7, inputs), generator=generator, dtype=torch.int8)
    scale = torch.rand(7, -(-inputs // size), generator=generator) + 0.1
    zero = torch.randint(-8, 8, scale.shape, generator=generator, dtype=torch.int8) if has_zero_points else None
    bias = torch.randn(7, generator=generator) if has_bias else None
    arguments = (x, codes, scale, zero, bias, size, rounds)
    torch.library.opcheck(GROUPED_LINEAR, arguments)
    steps = codes.int() if zero is None else codes.int() - zero.int().repeat_interleave(size, 1)[:, :inputs]
    weight = torch.stack([steps[:, column] * scale[:, column // size] for column in range(inputs)], dim=1)
    read = round_rows(x, DynamicParams(size=size)) if rounds else x
    expected = read.double() @ weight.double().mT + (0 if bias is None else bias.double())
    torch.testing.assert_close(GROUPED_LINEAR(*arguments).double(), expected, rtol=1e-5, atol=1e-4)


def test_a_grouped_product_refuses_other_groups() -> None:
    with pytest.raises(UsageError, match="groups of 4"):
        GROUPED_LINEAR(torch.zeros(1, 8), torch.zeros(3, 8, dtype=torch.int8), torch.ones(3, 3), None, None, 4, False)
