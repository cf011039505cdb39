"""What a user gets from ``torch.onnx.export`` alone: nothing is folded."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["export_plainly"]


def export_plainly(model: torch.nn.Module | torch.export.ExportedProgram, example: Tensor, path: Path) -> None:
    """Write a model of images with a free batch as ONNX."""
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            model,
            (example,),
            dynamo=True,
            input_names=["image"],
            dynamic_shapes={"image": {0: torch.export.Dim("batch")}},
            verbose=False,
        )
    assert program is not None
    program.save(path)
