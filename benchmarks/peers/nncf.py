"""NNCF's post-training quantization of the ONNX file, run by its own environment's Python."""

from __future__ import annotations

import nncf
import onnx
import onnxruntime
from nncf.parameters import ModelType
from nncf.quantization.advanced_parameters import AdvancedQuantizationParameters, OverflowFix

from benchmarks.peers.order import Floats, Order, Quantized, obey

TENSORS = "inputs and weights of linear maps and convolutions; of attention q and k"
"""Counted in the zoo's ViT: its CPU configuration leaves softmax times v in float for transformers."""
CONVOLUTIONS_TENSORS = "inputs and weights of linear maps and convolutions; sums"


def quantize(order: Order, samples: Floats) -> Quantized:
    """Quantize as NNCF's documentation says for the type of model.

    Transformers get ``ModelType.TRANSFORMER`` and with it SmoothQuant; all get the mixed preset, the default of
    transformers: asymmetric activations. ``fast bias correction`` is the default; the other one is called more
    accurate by the documentation. The overflow fix (weights of 7 bits) is off, as VNNI does not overflow.
    """
    is_convolutional = "resnet" in order.model
    quantized = nncf.quantize(
        onnx.load(order.onnx),
        nncf.Dataset(list(samples), lambda image: {"image": image[None]}),
        preset=nncf.QuantizationPreset.MIXED,
        subset_size=len(samples),
        fast_bias_correction="fast" in order.setting,
        model_type=None if is_convolutional else ModelType.TRANSFORMER,
        advanced_parameters=AdvancedQuantizationParameters(overflow_fix=OverflowFix.DISABLE),
    )
    session = onnxruntime.InferenceSession(quantized.SerializeToString(), providers=["CPUExecutionProvider"])
    return Quantized(
        lambda images: session.run(None, {"image": images})[0], CONVOLUTIONS_TENSORS if is_convolutional else TENSORS
    )


if __name__ == "__main__":
    obey("nncf", quantize)
