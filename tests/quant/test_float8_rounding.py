"""Codes that are 8-bit floats, held to onnxruntime's QuantizeLinear and DequantizeLinear and to their definition."""

from __future__ import annotations

from fractions import Fraction
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper
from onnxruntime.capi.onnxruntime_inference_collection import InferenceSession
from onnxruntime.capi.onnxruntime_pybind11_state import SessionOptions
from torch import Tensor

from normfuse.errors import UsageError
from normfuse.kernels.ops import DEQUANTIZE, QUANTIZE_FLOAT8
from normfuse.quant import PerChannel, PerTensor, QuantParams, dequantize, quantize, quantize_dequantize
from normfuse.quant.float_type import FLOAT8
from normfuse.quant.rounding import dequantize_tensor, to_float8
from normfuse.runtime.onnx_session import AS_WRITTEN

CODES = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
"""All of them; 0x7f and 0xff are no numbers."""
NUMBERS = sorted({float(code) for code in CODES.float() if not code.isnan()})
MIDWAY = [(low + high) / 2 for low, high in pairwise(NUMBERS)]


@cache
def engine(rank: int) -> InferenceSession:
    """A real pair, per channel on axis 1 if rank is 1; numpy has no such codes, so they are shown as floats."""
    shape, float32 = ["c"] * rank, TensorProto.FLOAT
    nodes = [
        helper.make_node("Sub", ["scale", "scale"], ["none"]),
        helper.make_node("Cast", ["none"], ["zeros"], to=TensorProto.FLOAT8E4M3FN),
        helper.make_node("QuantizeLinear", ["x", "scale", "zeros"], ["codes"], axis=1),
        helper.make_node("Cast", ["codes"], ["shown"], to=float32),
        helper.make_node("DequantizeLinear", ["codes", "scale", "zeros"], ["values"], axis=1),
    ]
    graph = helper.make_graph(
        nodes,
        "pair",
        [
            helper.make_tensor_value_info("x", float32, ["n", "c"]),
            helper.make_tensor_value_info("scale", float32, shape),
        ],
        [helper.make_tensor_value_info(name, float32, ["n", "c"]) for name in ("shown", "values")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    options = SessionOptions()
    options.intra_op_num_threads = 1
    for name, value in AS_WRITTEN.items():
        options.add_session_config_entry(name, value)
    return InferenceSession(onnx.ModelProto.SerializeToString(model), options)


def params_of(scale: Tensor) -> QuantParams:
    zero = torch.zeros(scale.shape, dtype=torch.int32)
    return QuantParams(
        scale=scale, zero_point=zero, type=FLOAT8, granularity=PerChannel(1) if scale.ndim else PerTensor()
    )


def hold_to_engine(x: Tensor, scale: Tensor) -> None:
    params = params_of(scale)
    shown, values = engine(scale.ndim).run(None, {"x": x.numpy(), "scale": scale.numpy()})
    codes = quantize(x, params)
    assert codes.dtype is torch.float8_e4m3fn
    np.testing.assert_array_equal(bits(codes.float()), bits(shown))
    np.testing.assert_array_equal(bits(dequantize(codes, params)), bits(values))
    np.testing.assert_array_equal(bits(quantize_dequantize(x, params)), bits(values))


def bits(values: Any) -> Any:
    """Return the bits of floats, so that -0.0 differs from 0.0; of what is not a number the sign alone."""
    found = np.asarray(values, dtype=np.float32)
    return np.where(np.isnan(found), np.float32(np.nan), found).view(np.int32)


EXTREME = [0.0, -0.0, 1e-45, -1e-45, 1e-38, -1e-38, 3.4028235e38, -3.4028235e38, np.inf, -np.inf, np.nan, 448, 464, 480]


@pytest.mark.parametrize("scale", [1.0, 0.5, 0.1, 1 / 3, 2.0**-14, 1e-30, 7.3e-5, 1e30])
def test_extreme_values_equal_onnxruntime(scale: float) -> None:
    size = torch.tensor(scale, dtype=torch.float32)
    points = (torch.tensor(NUMBERS + MIDWAY, dtype=torch.float64) * scale).float()
    beside = [torch.nextafter(points, torch.tensor(end)) for end in (3.4e38, -3.4e38)]
    x = torch.cat([points, *beside, torch.tensor(EXTREME), torch.tensor(EXTREME) * size])
    hold_to_engine(x[None], size)
    hold_to_engine(x[:, None], size)


def test_random_values_equal_onnxruntime_per_channel() -> None:
    generator = torch.Generator().manual_seed(5)
    scale = torch.exp(torch.randn(37, generator=generator) * 3)
    wide = torch.exp(torch.randn(211, 37, generator=generator) * 4)
    hold_to_engine(torch.randn(211, 37, generator=generator) * scale * wide, scale)


@given(
    st.lists(st.floats(width=32), min_size=1, max_size=40),
    st.floats(min_value=2.0**-126, max_value=2.0**126, width=32),
)
def test_any_values_equal_onnxruntime(values: list[float], scale: float) -> None:
    hold_to_engine(torch.tensor([values]), torch.tensor(scale))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_number_is_its_own_code(dtype: torch.dtype) -> None:
    for scale in (1.0, 0.25, 2.0**-20):
        x = CODES.to(dtype) * scale
        codes = to_float8(x, torch.tensor(scale, dtype=dtype))
        is_number = ~CODES.float().isnan()
        assert torch.equal(codes.view(torch.uint8)[is_number], CODES.view(torch.uint8)[is_number])
        assert bool(codes.float()[~is_number].isnan().all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_midway_goes_to_the_even_code(dtype: torch.dtype) -> None:
    codes = to_float8(torch.tensor(MIDWAY, dtype=dtype), torch.ones((), dtype=dtype))
    assert not bool((codes.view(torch.uint8) & 1).any())
    assert float((codes.float() - torch.tensor(MIDWAY)).abs().max()) == 16.0


def nearest(value: Fraction) -> float:
    """Return the nearest number that has a code, the even one of two."""
    saturated = min(max(value, Fraction(-448)), Fraction(448))
    away = min(abs(saturated - Fraction(number)) for number in NUMBERS)
    found = [number for number in NUMBERS if abs(saturated - Fraction(number)) == away]
    evens = [n for n in found if not int(torch.tensor(n).to(torch.float8_e4m3fn).view(torch.uint8)) & 1]
    return found[0] if len(found) == 1 else evens[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_beside_midway_go_to_the_nearer_code(dtype: torch.dtype) -> None:
    """In float64 they are nearer to midway than float32 tells: rounded by way of it they would be rounded twice."""
    points = torch.tensor(MIDWAY, dtype=dtype)
    for end in (-1e9, 1e9):
        x = torch.nextafter(points, torch.tensor(end, dtype=dtype))
        codes = to_float8(x, torch.ones((), dtype=dtype)).float()
        assert codes.tolist() == [nearest(Fraction(float(value))) for value in x]


@given(st.floats(-1e3, 1e3, width=64), st.sampled_from([torch.float32, torch.float64]))
def test_any_value_goes_to_the_nearest_code(value: float, dtype: torch.dtype) -> None:
    x = torch.tensor([value, value / 2**12], dtype=dtype)
    codes = to_float8(x, torch.ones((), dtype=dtype)).float()
    assert codes.tolist() == [nearest(Fraction(float(each))) for each in x]


def test_float64_stays_so() -> None:
    params = params_of(torch.tensor([0.3, 0.7]))
    x = torch.tensor([[0.1, -5.0], [900.0, 1e-9]], dtype=torch.float64)
    assert quantize_dequantize(x, params).dtype is torch.float64
    codes = quantize(x, params)
    values = codes.double() * params.scale.double()
    assert torch.equal(quantize_dequantize(x, params), values)


def test_saturation_and_signs() -> None:
    x = torch.tensor([449.0, 464.0, 465.0, 1e30, torch.inf, -449.0, -torch.inf, 0.0, -0.0, 2.0**-10, -(2.0**-10)])
    codes = to_float8(x, torch.tensor(1.0))
    assert codes.view(torch.uint8).tolist() == [0x7E] * 5 + [0xFE] * 2 + [0, 0x80, 0, 0x80]
    assert to_float8(torch.tensor([torch.nan]), torch.tensor(1.0)).float().isnan().item()


def test_the_operators_of_graphs_are_these_functions() -> None:
    x = torch.randn(5, 3, 7, generator=torch.Generator().manual_seed(1)) * 300
    for axis, scale in ((-1, torch.tensor(0.7)), (1, torch.tensor([0.7, 1.3, 0.2]))):
        zero = torch.zeros(scale.shape, dtype=torch.float8_e4m3fn)
        codes = QUANTIZE_FLOAT8(x, scale, zero, axis)
        assert torch.equal(codes.view(torch.uint8), quantize(x, params_of(scale)).view(torch.uint8))
        assert torch.equal(DEQUANTIZE(codes, scale, zero, axis), dequantize(codes, params_of(scale)))
        meta = QUANTIZE_FLOAT8(x.to("meta"), scale.to("meta"), zero.to("meta"), axis)
        assert (meta.shape, meta.dtype) == (codes.shape, codes.dtype)


def test_other_floats_are_no_codes() -> None:
    with pytest.raises(UsageError, match="float8_e4m3fn"):
        dequantize_tensor(torch.zeros(2).to(torch.float8_e5m2), torch.ones(()), torch.zeros((), dtype=torch.int32), -1)
