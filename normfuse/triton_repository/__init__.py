"""A model repository for Triton Inference Server, written from an artifact (docs/serving.md)."""

from normfuse.triton_repository.backends import ONNXRUNTIME, TENSORRT, Backend
from normfuse.triton_repository.model_config import ModelConfig
from normfuse.triton_repository.write_repository import Served, Serving, write_repository

__all__ = ["ONNXRUNTIME", "TENSORRT", "Backend", "ModelConfig", "Served", "Serving", "write_repository"]
