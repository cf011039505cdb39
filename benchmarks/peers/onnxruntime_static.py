"""onnxruntime's own static quantization, used as its documentation says."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

__all__ = ["quantize_u8s8"]

Floats = npt.NDArray[np.float32]


class _Reader(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, name: str, batches: Iterable[Floats]) -> None:
        self._feeds: Iterator[dict[str, Floats]] = ({name: batch} for batch in batches)

    def get_next(self) -> dict[str, Floats] | None:
        return next(self._feeds, None)


def quantize_u8s8(source: Path, target: Path, *, input_name: str, batches: Iterable[Floats]) -> None:
    """Write an int8 QDQ model: pre-processed, unsigned activations, signed weights per channel, min-max ranges."""
    logging.getLogger().setLevel(logging.ERROR)  # it warns on the root logger of every one-dimensional weight
    with tempfile.TemporaryDirectory() as folder:
        ready = Path(folder) / "ready.onnx"
        quant_pre_process(str(source), str(ready), skip_symbolic_shape=True)
        quantize_static(
            str(ready),
            str(target),
            _Reader(input_name, batches),
            quant_format=QuantFormat.QDQ,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            per_channel=True,
        )
