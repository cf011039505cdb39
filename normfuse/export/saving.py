"""Writes a checked ONNX file, its constants beside it where one file would not hold them."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import onnx
import onnx_ir as ir

__all__ = ["save_checked"]

LARGEST_SINGLE_FILE: Final = 1_800_000_000
"""Bytes of constants above which they go to a file beside the model (protobuf ends at 2 GiB)."""


def save_checked(model: ir.Model, path: Path) -> None:
    """Write a model, and beside it ``model.onnx.data`` where its constants are large; constants may lie elsewhere.

    Raises:
        onnx.checker.ValidationError: it is no valid ONNX.
    """
    constants = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value)
    external = f"{path.name}.data" if constants > LARGEST_SINGLE_FILE else None
    if external is None:
        ir.external_data.load_to_model(model)  # of a model whose constants another file holds
    ir.save(model, path, external_data=external)
    onnx.checker.check_model(str(path), full_check=external is None)
