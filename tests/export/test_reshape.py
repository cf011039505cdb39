"""Reshapes of permuted tensors, whatever strides the exporter guesses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, export

from normfuse.build import write_float
from normfuse.export.onnx import export_onnx
from normfuse.graph import capture
from normfuse.runtime.agreement import output_error
from normfuse.runtime.onnx_session import open_onnx
from normfuse.testing import Small, randomized, seeded


@pytest.mark.slow
def test_a_swin_of_transformers_runs_in_onnxruntime(tmp_path: Path) -> None:
    from transformers import SwinConfig, SwinForImageClassification

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            sizes = {"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4]}
            self.model = SwinForImageClassification(SwinConfig(window_size=4, num_labels=5, **sizes))

        def forward(self, image: Tensor) -> Tensor:
            logits: Tensor = self.model(pixel_values=image).logits
            return logits

    model = randomized(Logits())
    graph = capture(model, (torch.randn(2, 3, 32, 32, generator=seeded(0)),))
    write_float(graph, path := tmp_path / "model.onnx")
    engine = open_onnx(path, threads=1)
    for batch in (1, 3):
        x = torch.randn(batch, 3, 32, 32, generator=seeded(batch))
        (found,) = engine.run({"image": x.numpy()}).values()
        with torch.no_grad():
            assert output_error(found, model(x).numpy()) < 1e-4


def test_two_free_sizes(tmp_path: Path) -> None:
    def turned(m: Any, x: Tensor) -> Tensor:
        y = m.a(x).reshape(x.shape[0], x.shape[1], 2, 3).transpose(1, 2)
        result: Tensor = y.reshape(x.shape[0], 2, 3 * x.shape[1]).relu()
        return result

    model = randomized(Small(turned, a=nn.Linear(5, 6)))
    example = torch.randn(2, 4, 5, generator=seeded(0))
    program = export(model, (example,), dynamic_shapes={"x": {0: Dim("batch"), 1: Dim("tokens")}})
    export_onnx(capture(program), path := tmp_path / "model.onnx")
    for shape in [(1, 4, 5), (3, 7, 5)]:
        x = torch.randn(shape, generator=seeded(1))
        (found,) = open_onnx(path, threads=1).run({"x": x.numpy()}).values()
        assert output_error(found, model(x).detach().numpy()) < 1e-5


def test_a_free_batch_costs_no_computed_size(tmp_path: Path) -> None:
    model = randomized(Small(lambda m, x: m.a(x).reshape(x.shape[0], 2, 12), a=nn.Linear(5, 6)))
    export_onnx(capture(model, (torch.randn(2, 4, 5),)), path := tmp_path / "model.onnx")
    kinds = {node.op_type for node in onnx.load(path).graph.node}
    assert "Reshape" in kinds
    assert not kinds & {"Shape", "Concat", "Gather", "Slice"}
