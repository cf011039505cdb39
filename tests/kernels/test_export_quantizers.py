from __future__ import annotations

import logging
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnxruntime.capi.onnxruntime_inference_collection import InferenceSession
from onnxruntime.capi.onnxruntime_pybind11_state import SessionOptions
from torch import Tensor, nn

from normfuse.export.quantizer_translation import translation_table
from normfuse.quant import (
    INT4,
    INT8,
    INT8_NARROW,
    INT16,
    UINT4,
    UINT8,
    IntegerType,
    asymmetric,
    quantize,
    weight_params,
)

IN, OUT = 37, 53


class _QuantizedLinear(nn.Module):
    """x → quantize → dequantize → linear with int8 weight and int32 bias → quantize → dequantize."""

    def __init__(self, activation: IntegerType) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(7)
        weight, bias = torch.randn(OUT, IN, generator=generator), torch.randn(OUT, generator=generator)
        self.limits = (activation.minimum, activation.maximum)
        params = weight_params(weight, 0, INT8_NARROW)
        x, y = asymmetric(-2.0, 3.0, activation), asymmetric(-17.0, 19.0, activation)
        bias_scale = x.scale * params.scale
        constants = {
            "weight": quantize(weight, params),
            "weight_scale": params.scale,
            "weight_zero_point": params.stored_zero_point,
            "bias": torch.round(bias / bias_scale).to(torch.int32),
            "bias_scale": bias_scale,
            "bias_zero_point": torch.zeros(OUT, dtype=torch.int32),
            "x_scale": x.scale,
            "x_zero_point": x.stored_zero_point,
            "y_scale": y.scale,
            "y_zero_point": y.zero_point,  # int32: needs a cast, which the exporter folds away
        }
        for name, value in constants.items():
            self.register_buffer(name, value)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        b: Any = self
        codes = torch.ops.normfuse.quantize(x, b.x_scale, b.x_zero_point, -1, *self.limits)
        x = torch.ops.normfuse.dequantize(codes, b.x_scale, b.x_zero_point, -1)
        weight = torch.ops.normfuse.dequantize(b.weight, b.weight_scale, b.weight_zero_point, 0)
        bias = torch.ops.normfuse.dequantize(b.bias, b.bias_scale, b.bias_zero_point, 0)
        y = nn.functional.linear(x, weight, bias)
        y_codes = torch.ops.normfuse.quantize(y, b.y_scale, b.y_zero_point, -1, *self.limits)
        return torch.ops.normfuse.dequantize(y_codes, b.y_scale, b.y_zero_point, -1), codes, y_codes


def _export(model: nn.Module, x: Tensor) -> ir.Model:
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    program = torch.export.export(model.eval(), (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own deprecation warnings
        exported = torch.onnx.export(
            program, dynamo=True, opset_version=21, custom_translation_table=translation_table(), verbose=False
        )
    assert exported is not None
    model_proto: Any = exported.model
    assert isinstance(model_proto, ir.Model)
    return model_proto


def _run(path: Path, x: Tensor) -> list[np.typing.NDArray[Any]]:
    options = SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    session = InferenceSession(str(path), options)
    results: Any = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    return [np.asarray(result) for result in results]


@pytest.fixture
def x(request: pytest.FixtureRequest) -> Tensor:
    shape = request.param
    return torch.randn(*shape, generator=torch.Generator().manual_seed(13)) * 1.5


@pytest.mark.parametrize("x", [(3, IN), (2, 5, IN)], ids=["matrix", "tokens"], indirect=True)
@pytest.mark.parametrize("activation", [UINT8, INT8, INT4], ids=str)
def test_engine_equals_simulation(activation: IntegerType, x: Tensor, tmp_path: Path) -> None:
    model = _QuantizedLinear(activation)
    path = tmp_path / "model.onnx"
    ir.save(_export(model, x), path)
    onnx.checker.check_model(str(path), full_check=True)
    longer = torch.cat([x, -x, 3 * x])  # another batch than the traced one
    values, codes, y_codes = _run(path, longer)
    expected_values, expected_codes, expected_y_codes = model(longer)
    np.testing.assert_array_equal(codes, expected_codes.numpy())
    # The product is summed in another order, so a value beside a tie may take the other code: one, never two.
    off = np.abs(y_codes.astype(int) - expected_y_codes.numpy().astype(int))
    assert off.max() <= 1
    assert np.abs(values - expected_values.numpy()).max() <= 1.0001 * float(model.get_buffer("y_scale"))


@pytest.mark.parametrize("x", [(3, IN), (2, 5, IN)], ids=["matrix", "tokens"], indirect=True)
def test_file_holds_integers_under_the_graphs_names(x: Tensor, tmp_path: Path) -> None:
    model = _export(_QuantizedLinear(UINT8), x)
    counts = Counter(node.op_type for node in model.graph)
    product = {"Gemm": 1} if x.ndim == 2 else {"Transpose": 1, "MatMul": 1, "Add": 1}
    assert counts == {"QuantizeLinear": 2, "DequantizeLinear": 4} | product
    constants = {name: value.dtype for name, value in model.graph.initializers.items()}
    assert constants["weight"] == constants["weight_zero_point"] == ir.DataType.INT8
    assert constants["bias"] == constants["bias_zero_point"] == ir.DataType.INT32
    assert constants["x_zero_point"] == ir.DataType.UINT8
    assert [value.name for value in model.graph.outputs] == ["dequantize_3", "quantize", "quantize_1"]
    assert [node.outputs[0].name for node in model.graph if node.op_type == "QuantizeLinear"] == [
        "quantize",
        "quantize_1",
    ]
    assert isinstance(model.graph.inputs[0].shape[0], ir.SymbolicDim)  # type: ignore[index]


class _Quantizer(nn.Module):
    def __init__(self, kind: IntegerType, channels: int) -> None:
        super().__init__()
        self.kind = kind
        generator = torch.Generator().manual_seed(17)
        self.register_buffer("scale", torch.rand(channels, generator=generator) / kind.levels * 6 + 1e-6)
        self.register_buffer(
            "zero_point", torch.randint(kind.minimum, kind.maximum + 1, (channels,), generator=generator)
        )

    def forward(self, x: Tensor) -> Tensor:
        b: Any = self
        codes: Tensor = torch.ops.normfuse.quantize(x, b.scale, b.zero_point, 1, self.kind.minimum, self.kind.maximum)
        return codes


@pytest.mark.parametrize("kind", [INT8, UINT4, INT8_NARROW, INT16, IntegerType(16, signed=False)], ids=str)
@pytest.mark.parametrize("x", [(3, 7, 5)], ids=["channels"], indirect=True)
def test_channels_and_other_widths(kind: IntegerType, x: Tensor, tmp_path: Path) -> None:
    model = _Quantizer(kind, 7)
    ir.save(_export(model, x), tmp_path / "model.onnx")
    (codes,) = _run(tmp_path / "model.onnx", x)
    np.testing.assert_array_equal(codes, model(x).numpy())


@pytest.mark.parametrize("x", [(3, 7, 5)], ids=["channels"], indirect=True)
def test_widths_that_onnx_has_no_codes_for_are_refused(x: Tensor) -> None:
    with pytest.raises(torch.onnx.OnnxExporterError, match=r"no codes 0 \.\.\. 131071"):
        _export(_Quantizer(IntegerType(17, signed=False), 7), x)
