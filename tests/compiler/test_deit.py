"""DeiT-S shapes from transformers, random weights: every frozen norm folds, and the fold is exact."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch

from benchmarks.deit import NORMS, deit_small, images
from normfuse.build import FOLDING, write_float
from normfuse.checks import check_fold
from normfuse.graph import capture, ops
from normfuse.graph.edit import converted
from normfuse.runtime.agreement import output_error
from normfuse.runtime.onnx_session import open_onnx


@pytest.mark.slow
@pytest.mark.parametrize("norm", list(NORMS))
def test_twelve_blocks_fold_exactly(norm: str, tmp_path: Path) -> None:
    model = deit_small(norm)
    graph = capture(model, [images(2)])
    sample = images(2, seed=3)

    folded, reports = write_float(graph, tmp_path / "model.onnx")
    wide = converted(graph, torch.float64)
    FOLDING.run(wide)
    check = check_fold(graph, wide, [[sample]])
    assert check.holds, check
    expected = model(sample).detach()
    assert output_error(folded.run(sample)[0].numpy(), expected.numpy()) <= 1e-4

    counts = {report.name: dict(report.applied) for report in reports}
    assert counts["fold-affine-into-consumers"] == {"fold-before-linear": 25}
    layer_norms = [node for node in folded.nodes if node.target is ops.LAYER_NORM]
    assert len(layer_norms) == (25 if norm == "LN" else 0)
    written = [node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node]
    assert "Mul" not in written
    assert "BatchNormalization" not in written
    assert written.count("LayerNormalization") == len(layer_norms)
    engine = open_onnx(tmp_path / "model.onnx", threads=1)
    assert output_error(engine(image=sample.numpy())["output"], expected.numpy()) <= 1e-4
