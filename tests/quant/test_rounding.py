from __future__ import annotations

from functools import cache

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
from normfuse.quant import (
    INT4,
    INT8,
    INT32,
    UINT4,
    UINT8,
    IntegerType,
    PerChannel,
    PerGroup,
    PerTensor,
    QuantParams,
    dequantize,
    quantize,
    quantize_dequantize,
)
from normfuse.quant.rounding import dequantize_tensor, quantize_tensor

ONNX_TYPES = {torch.uint8: TensorProto.UINT8, torch.int8: TensorProto.INT8, torch.int16: TensorProto.INT16}
INT16 = IntegerType(16, signed=True)


@cache
def _engine(dtype: torch.dtype, rank: int) -> InferenceSession:
    """A real QuantizeLinear and DequantizeLinear, unfused, per channel on axis 1 if rank is 1."""
    code, float32 = ONNX_TYPES[dtype], TensorProto.FLOAT
    shape = ["c"] * rank
    inputs = [("x", float32, ["n", "c"]), ("scale", float32, shape), ("zero_point", code, shape)]
    outputs = [("codes", code, ["n", "c"]), ("values", float32, ["n", "c"])]
    graph = helper.make_graph(
        [
            helper.make_node("QuantizeLinear", ["x", "scale", "zero_point"], ["codes"], axis=1),
            helper.make_node("DequantizeLinear", ["codes", "scale", "zero_point"], ["values"], axis=1),
        ],
        "pair",
        [helper.make_tensor_value_info(*value) for value in inputs],
        [helper.make_tensor_value_info(*value) for value in outputs],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    options = SessionOptions()
    options.intra_op_num_threads = 1
    return InferenceSession(onnx.ModelProto.SerializeToString(model), options)


def _hold_to_engine(x: Tensor, params: QuantParams) -> None:
    rank = params.scale.ndim
    feeds = {"x": x.numpy(), "scale": params.scale.numpy(), "zero_point": params.stored_zero_point.numpy()}
    codes, values = _engine(params.type.torch_dtype, rank).run(None, feeds)
    ours = quantize(x, params)
    np.testing.assert_array_equal(ours.numpy(), codes)
    np.testing.assert_array_equal(_bits(dequantize(ours, params)), _bits(values))
    np.testing.assert_array_equal(_bits(quantize_dequantize(x, params)), _bits(values))


def _bits(values: object) -> np.typing.NDArray[np.int32]:
    return np.asarray(values, dtype=np.float32).view(np.int32)  # so that -0.0 differs from 0.0


def _per_tensor(scale: float, zero_point: int, kind: IntegerType) -> QuantParams:
    return QuantParams(
        scale=torch.tensor(scale, dtype=torch.float32),
        zero_point=torch.tensor(zero_point, dtype=torch.int32),
        type=kind,
        granularity=PerTensor(),
    )


EXTREME = [0.0, -0.0, 1e-45, -1e-45, 1e-38, -1e-38, 3.4028235e38, -3.4028235e38, 2.0**24, -(2.0**31), 2.0**31, 2.0**63]


@pytest.mark.parametrize("scale", [1.0, 0.5, 0.1, 1 / 3, 2.0**-126, 1e30, 7.3e-5])
@pytest.mark.parametrize(
    ("kind", "zero_point"), [(UINT8, 0), (UINT8, 255), (UINT8, 93), (INT8, 0), (INT8, -128), (INT8, 17), (INT16, -71)]
)
def test_extreme_values_equal_onnxruntime(scale: float, kind: IntegerType, zero_point: int) -> None:
    # Odd row lengths reach both the vector loop and its scalar tail.
    ties = (torch.arange(-603, 604, dtype=torch.float64) / 2 * scale).float().clamp(-3.4e38, 3.4e38)
    beside_ties = torch.cat([torch.nextafter(ties, torch.tensor(end)) for end in (3.4e38, -3.4e38)])
    x = torch.cat([ties, beside_ties, torch.tensor(EXTREME)])
    _hold_to_engine(x[None], _per_tensor(scale, zero_point, kind))
    _hold_to_engine(x[:, None], _per_tensor(scale, zero_point, kind))


@pytest.mark.parametrize("kind", [UINT8, INT8, INT16], ids=str)
def test_random_values_equal_onnxruntime_per_channel(kind: IntegerType) -> None:
    generator = torch.Generator().manual_seed(5)
    channels = 37
    scale = torch.exp(torch.randn(channels, generator=generator) * 3)
    zero_point = torch.randint(kind.minimum, kind.maximum + 1, (channels,), generator=generator, dtype=torch.int32)
    params = QuantParams(scale=scale, zero_point=zero_point, type=kind, granularity=PerChannel(1))
    x = torch.randn(211, channels, generator=generator) * scale * kind.levels / 3
    _hold_to_engine(x, params)


@given(
    st.lists(st.floats(allow_nan=False, allow_infinity=False, width=32), min_size=1, max_size=40),
    st.floats(min_value=2.0**-126, max_value=2.0**126, width=32),
    st.integers(0, 255),
    st.booleans(),
)
def test_any_values_equal_onnxruntime(values: list[float], scale: float, zero_point: int, signed: bool) -> None:
    params = _per_tensor(scale, zero_point - 128 * signed, INT8 if signed else UINT8)
    _hold_to_engine(torch.tensor([values]), params)


def test_ties_go_to_even() -> None:
    x = torch.tensor([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5])
    assert quantize(x, _per_tensor(1.0, 0, INT8)).tolist() == [-2, -2, 0, 0, 2, 2]


def test_short_ranges_saturate_at_their_own_ends() -> None:
    x = torch.tensor([-99.0, -8.4, 7.4, 99.0])
    assert quantize(x, _per_tensor(1.0, 0, IntegerType(4, signed=True))).tolist() == [-8, -8, 7, 7]
    assert quantize(x - 100, _per_tensor(1.0, 0, IntegerType(8, signed=True, narrow=True))).tolist()[0] == -127


def test_int32_saturates_without_wrapping() -> None:
    x = torch.tensor([-1e20, -(2.0**31), 2.0**24 + 2, 2.0**31, 1e20])
    codes = quantize(x, _per_tensor(1.0, 0, INT32))
    assert codes.dtype == torch.int32
    assert codes.tolist() == [-(2**31), -(2**31), 2**24 + 2, 2**31 - 1, 2**31 - 1]


def test_float64_is_computed_in_float64() -> None:
    tie_in_float32 = torch.tensor([0.5 + 2.0**-40], dtype=torch.float64)
    params = _per_tensor(1.0, 0, INT8)
    assert quantize(tie_in_float32, params).item() == 1
    assert quantize(tie_in_float32.float(), params).item() == 0
    assert quantize_dequantize(tie_in_float32, params).dtype == torch.float64


def test_channels_lie_on_the_given_axis() -> None:
    scale = torch.tensor([1.0, 2.0, 4.0])
    params = QuantParams(
        scale=scale, zero_point=torch.zeros(3, dtype=torch.int32), type=INT8, granularity=PerChannel(1)
    )
    codes = quantize(torch.full((2, 3, 5), 8.0), params)
    assert codes[1, :, 4].tolist() == [8, 4, 2]


@cache
def _blocked_engine(code: int, axis: int, size: int) -> InferenceSession:
    """DequantizeLinear with block_size; onnxruntime takes no 4-bit inputs from numpy, so int8 ones are cast first."""
    shape = ["a", "b", "c"]
    inputs = [
        ("codes", TensorProto.INT8, shape),
        ("scale", TensorProto.FLOAT, shape),
        ("zeros", TensorProto.INT8, shape),
    ]
    graph = helper.make_graph(
        [
            helper.make_node("Cast", ["codes"], ["codes_cast"], to=code),
            helper.make_node("Cast", ["zeros"], ["zeros_cast"], to=code),
            helper.make_node(
                "DequantizeLinear", ["codes_cast", "scale", "zeros_cast"], ["values"], axis=axis, block_size=size
            ),
        ],
        "blocked",
        [helper.make_tensor_value_info(*value) for value in inputs],
        [helper.make_tensor_value_info("values", TensorProto.FLOAT, ["d", "e", "f"])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    return InferenceSession(onnx.ModelProto.SerializeToString(model), SessionOptions())


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("size", [2, 4, 5])
@pytest.mark.parametrize("kind", [INT4, UINT4, INT8], ids=str)
def test_groups_dequantize_as_onnxruntimes_blocks(kind: IntegerType, axis: int, size: int) -> None:
    generator = torch.Generator().manual_seed(axis)
    granularity = PerGroup(axis, size)
    shape = [3, 4, 6]
    shape[axis] = 4 * size - 1  # the last group is shorter
    scale = torch.exp(torch.randn(granularity.grouped(shape), generator=generator))
    zero_point = torch.randint(kind.minimum, kind.maximum + 1, scale.shape, generator=generator, dtype=torch.int32)
    params = QuantParams(scale=scale, zero_point=zero_point, type=kind, granularity=granularity)
    codes = quantize(torch.randn(shape, generator=generator) * kind.levels / 3, params)
    onnx_type = {INT4: TensorProto.INT4, UINT4: TensorProto.UINT4, INT8: TensorProto.INT8}[kind]
    feeds = {"codes": codes.to(torch.int8), "scale": scale, "zeros": zero_point.to(torch.int8)}
    (values,) = _blocked_engine(onnx_type, axis, size).run(None, {name: feed.numpy() for name, feed in feeds.items()})
    np.testing.assert_array_equal(_bits(dequantize(codes, params)), _bits(values))


def test_a_group_is_quantized_as_if_it_were_alone() -> None:
    x = torch.randn(3, 7, generator=torch.Generator().manual_seed(3)) * 5
    scale = torch.tensor([[1.0, 0.5, 0.25], [2.0, 0.1, 0.3], [0.7, 0.9, 1.1]])
    zero_point = torch.arange(9, dtype=torch.int32).reshape(3, 3)
    params = QuantParams(scale=scale, zero_point=zero_point, type=UINT4, granularity=PerGroup(1, 3))
    codes, values = quantize(x, params), quantize_dequantize(x, params)
    for row in range(3):
        for group in range(3):
            alone = _per_tensor(scale[row, group].item(), int(zero_point[row, group]), UINT4)
            block = x[row, group * 3 : group * 3 + 3]
            assert torch.equal(codes[row, group * 3 : group * 3 + 3], quantize(block, alone))
            assert torch.equal(values[row, group * 3 : group * 3 + 3], quantize_dequantize(block, alone))


@pytest.mark.parametrize("shape", [(3, 2), (2, 3), (3, 3, 1)], ids=["too few", "other rows", "more axes"])
def test_scales_that_are_not_one_per_group_are_refused(shape: tuple[int, ...]) -> None:
    params = QuantParams(
        scale=torch.ones(shape),
        zero_point=torch.zeros(shape, dtype=torch.int32),
        type=INT4,
        granularity=PerGroup(1, 3),
    )
    with pytest.raises(UsageError, match="groups of 3"):
        quantize(torch.zeros(3, 7), params)


@pytest.mark.parametrize(
    ("x", "scale", "axis"),
    [
        (torch.zeros(2, 3), torch.ones(3), 2),
        (torch.zeros(2, 3), torch.ones(3), -1),
        (torch.zeros(2, 3), torch.ones(2), 1),
        (torch.zeros(2, 3), torch.ones(()), 1),
        (torch.zeros(2, 3), torch.ones(3, dtype=torch.float64), 1),
        (torch.zeros(2, 3, dtype=torch.float16), torch.ones(3, dtype=torch.float16), 1),
    ],
    ids=["no such axis", "vector per tensor", "wrong count", "scalar per channel", "types differ", "half"],
)
def test_what_does_not_fit_is_refused(x: Tensor, scale: Tensor, axis: int) -> None:
    with pytest.raises(UsageError):
        quantize_tensor(x, scale, torch.zeros(scale.shape, dtype=torch.int32), axis, 0, 255)


def test_floats_are_not_codes() -> None:
    with pytest.raises(UsageError, match="float32"):
        dequantize_tensor(torch.zeros(2), torch.ones(()), torch.zeros((), dtype=torch.int32), -1)
