"""What the files that write ONNX functions share: the domain, and the names that their bodies use."""

from __future__ import annotations

from typing import Any, Final

from onnxscript import opset21
from onnxscript.values import Opset

__all__ = ["DOMAIN", "INT8", "INT32", "INT64", "UINT8", "UINT64", "UP", "VERSION", "normfuse", "op"]

DOMAIN: Final = "normfuse"
VERSION: Final = 1
op: Any = opset21
normfuse: Any = Opset(DOMAIN, VERSION)

INT8, INT32, INT64, UINT8, UINT64 = 3, 6, 7, 2, 13
"""``onnx.TensorProto`` types."""

UP = 4611686018427387904
"""2^62: what makes anything below it in magnitude positive."""
