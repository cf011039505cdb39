"""A tiny real model, written for each test."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Protocol

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper


class WriteLinear(Protocol):
    def __call__(
        self, path: Path, *, batch: int | str = ..., inner: int = ..., outer: int = ..., layers: int = ...
    ) -> Path: ...


def _write(path: Path, *, batch: int | str = "batch", inner: int = 5, outer: int = 3, layers: int = 1) -> Path:
    """Write ``layers`` products with seeded random weights, input ``x`` [batch, inner], output ``y``."""
    generator = np.random.default_rng(7)
    widths = [inner] * layers + [outer]
    weights = [
        onnx.numpy_helper.from_array(generator.standard_normal((rows, columns)).astype(np.float32) / rows, f"w{index}")
        for index, (rows, columns) in enumerate(pairwise(widths))
    ]
    names = ["x", *(f"h{index}" for index in range(layers - 1)), "y"]
    nodes = [helper.make_node("MatMul", [names[i], f"w{i}"], [names[i + 1]]) for i in range(layers)]
    graph = helper.make_graph(
        nodes,
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, inner])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [batch, outer])],
        weights,
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)
    return path


@pytest.fixture
def write_linear() -> WriteLinear:
    return _write


@pytest.fixture
def linear(tmp_path: Path) -> Path:
    return _write(tmp_path / "linear.onnx")
