"""onnxruntime's own static quantization, used as its documentation says."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import onnxruntime
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

from benchmarks.peers.order import Floats, Order, Quantized, obey

__all__ = ["quantize_u8s8"]

PRODUCTS = ("MatMul", "Gemm", "Conv")


class Reader(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, name: str, batches: Iterable[Floats]) -> None:
        self._feeds: Iterator[dict[str, Floats]] = ({name: batch} for batch in batches)

    def get_next(self) -> dict[str, Floats] | None:
        return next(self._feeds, None)


def quantize_u8s8(
    source: Path,
    target: Path,
    *,
    input_name: str,
    batches: Iterable[Floats],
    operators: Sequence[str] | None = None,
    method: CalibrationMethod = CalibrationMethod.MinMax,
) -> None:
    """Write an int8 QDQ model: pre-processed, unsigned activations, signed weights per channel.

    Args:
        source: the float file.
        target: the int8 file.
        input_name: the name of the only input.
        batches: calibration samples.
        operators: the types of operators to quantize; None: all that it can.
        method: how ranges are found.
    """
    logging.getLogger().setLevel(logging.ERROR)  # it warns on the root logger of every one-dimensional weight
    with tempfile.TemporaryDirectory() as folder:
        ready = Path(folder) / "ready.onnx"
        quant_pre_process(str(source), str(ready), skip_symbolic_shape=True)
        quantize_static(
            str(ready),
            str(target),
            Reader(input_name, batches),
            quant_format=QuantFormat.QDQ,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            per_channel=True,
            op_types_to_quantize=operators,
            calibrate_method=method,
        )


def quantize(order: Order, samples: Floats) -> Quantized:
    """Quantize every operator that it can (its default) or the products alone, by min-max or entropy."""
    operators = PRODUCTS if "products" in order.setting else None
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "int8.onnx"
        quantize_u8s8(
            Path(order.onnx),
            target,
            input_name="image",
            batches=(image[None] for image in samples),
            operators=operators,
            method=CalibrationMethod.Entropy if "entropy" in order.setting else CalibrationMethod.MinMax,
        )
        session = onnxruntime.InferenceSession(target.read_bytes(), providers=["CPUExecutionProvider"])
    tensors = "inputs and outputs of MatMul, Gemm and Conv" if operators else "inputs and outputs of all it can"
    return Quantized(lambda images: session.run(None, {"image": images})[0], tensors)


if __name__ == "__main__":
    obey("onnxruntime", quantize)
