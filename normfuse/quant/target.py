"""Where an artifact runs, what makes its engine, and the types of numbers that only some targets have."""

from __future__ import annotations

from enum import Enum

__all__ = ["BodyType", "EightBits", "Target", "Via"]


class Target(Enum):
    """Where the artifact runs."""

    ONNX = "onnx"
    TRT = "trt"


class Via(Enum):
    """What a TensorRT engine is made of: the ONNX file, or the folded program by torch-tensorrt."""

    ONNX = "onnx"
    TORCH_TENSORRT = "torch-tensorrt"


class BodyType(Enum):
    """What floats are between a model's inputs and outputs; ``auto``: as the target is fast."""

    AUTO = "auto"
    FP32 = "fp32"
    FP16 = "fp16"
    BF16 = "bf16"


class EightBits(Enum):
    """What codes of eight bits are."""

    INT8 = "int8"
    FP8 = "fp8"  # E4M3
