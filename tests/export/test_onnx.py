"""The ONNX file: named, clean, portable, free of traces of this machine."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor, nn

from normfuse.build import write_float
from normfuse.errors import UnsupportedModel
from normfuse.export.onnx import IR_VERSION, OPSET, export_onnx
from normfuse.graph import capture
from normfuse.runtime.onnx_session import open_onnx


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, tokens: Tensor, weight: Tensor) -> dict[str, Tensor]:
        hidden = torch.softmax(self.first(tokens) * weight, dim=-1)
        return {"hidden": hidden, "logits": self.last(hidden)}


def exported(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    graph = capture(Named().eval(), [torch.randn(2, 5, 4), torch.randn(2, 1, 1)])
    write_float(graph, tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


def test_inputs_outputs_and_batch_keep_their_names(tmp_path: Path) -> None:
    session = open_onnx(exported(tmp_path))
    assert [port.name for port in session.inputs] == ["tokens", "weight"]
    assert [port.name for port in session.outputs] == ["hidden", "logits"]
    for batch in (1, 3):
        found = session(tokens=torch.randn(batch, 5, 4).numpy(), weight=torch.randn(batch, 1, 1).numpy())
        assert found["logits"].shape == (batch, 5, 3)


def test_nodes_carry_the_users_layers_and_no_paths(tmp_path: Path) -> None:
    path = exported(tmp_path)
    model = onnx.load(path)
    assert {"first/MatMul", "last/MatMul"} <= {node.name for node in model.graph.node}
    assert len({node.name for node in model.graph.node}) == len(model.graph.node)
    assert str(Path.cwd()).encode() not in path.read_bytes()
    assert b"site-packages" not in path.read_bytes()


def test_the_file_is_one_that_old_runtimes_read(tmp_path: Path) -> None:
    model = onnx.load(exported(tmp_path))
    assert model.ir_version == IR_VERSION
    assert {entry.domain: entry.version for entry in model.opset_import} == {"": OPSET}
    assert not {"Where", "IsNaN", "Shape"} & {node.op_type for node in model.graph.node}


def test_an_operator_that_onnx_lacks_is_named(tmp_path: Path) -> None:
    @torch.library.custom_op("normfuse_test::strange", mutates_args=())
    def strange(x: Tensor) -> Tensor:
        return x.clone()

    @strange.register_fake
    def _(x: Tensor) -> Tensor:
        return torch.empty_like(x)

    class Strange(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.ops.normfuse_test.strange(x) + 1

    graph = capture(Strange(), [torch.randn(2, 3)])
    with pytest.raises(UnsupportedModel, match="strange"):
        export_onnx(graph, tmp_path / "model.onnx")
    assert not (tmp_path / "model.onnx").exists()


class TwoBatches(nn.Module):
    """An output of several rows per sample, and an input whose rows are none of the batch's."""

    def forward(self, x: Tensor, words: Tensor) -> tuple[Tensor, Tensor]:
        return x.reshape(-1, 2), words.relu()


def test_only_the_batch_is_called_batch(tmp_path: Path) -> None:
    graph = capture(TwoBatches(), [torch.randn(2, 6), torch.randn(5, 3)])
    export_onnx(graph, tmp_path / "model.onnx")
    session = open_onnx(tmp_path / "model.onnx")
    axes = {port.name: port.axes[0] for port in (*session.inputs, *session.outputs)}
    assert axes["x"] == "batch"
    assert axes["words"] not in ("", "batch")
    assert [axes[port.name] == axes["words"] for port in session.outputs] == [False, True]
    assert axes[session.outputs[0].name] != "batch"
    found = session(x=torch.randn(4, 6).numpy(), words=torch.randn(7, 3).numpy())
    assert [array.shape for array in found.values()] == [(12, 2), (7, 3)]
