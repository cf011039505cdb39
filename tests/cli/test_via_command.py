"""``normfuse compile --target trt --via torch-tensorrt``: the same artifact, whose engine another library built."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from standin_tensorrt import hide_tensorrt
from standin_torch_tensorrt import VERSION, install_torch_tensorrt, told
from torch import nn

import normfuse
from normfuse.runtime.engine_sidecar import check_engine
from normfuse.testing import randomized, seeded

Run = Callable[..., Any]
"""``run`` of ``conftest``: how the command ended."""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a norm to fold, saved, and samples of it."""
    folder = tmp_path_factory.mktemp("files")
    model = randomized(nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 5)))
    normfuse.save(model, [torch.zeros(2, 6)], folder / "model.pt2")
    np.savez(folder / "data.npz", x=torch.randn(16, 6, generator=seeded(1)).numpy())
    return folder


def arguments(files: Path, out: Path, *more: object) -> list[object]:
    asked = ("--target", "trt", "--bits", 32, "--threads", 1, "--shapes", "input=1x6,3x6,8x6", "--no-benchmark", "-q")
    return ["compile", files / "model.pt2", "--calib", files / "data.npz", "-o", out, *asked, *more]


VIA = ("--via", "torch-tensorrt")


@pytest.mark.slow
def test_an_engine_of_the_folded_model(run: Run, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_torch_tensorrt(tmp_path, monkeypatch)
    out, plain = tmp_path / "out", tmp_path / "plain"
    done = run(*arguments(files, out, *VIA))
    assert (done.code, done.err) == (0, "")
    for text in (
        f"bytes by tensorrt {VERSION} via torch-tensorrt for SM90",
        "the builder listed no kernels",
        "  build with TensorRT 11: trtexec --onnx=model.onnx --saveEngine=model.engine --minShapes=input:1x6",
    ):
        assert text in done.out, text
    assert run("report", out).out == done.out
    assert run("verify", out).code == 0
    assert "<td>torch-tensorrt</td>" in (out / "report.html").read_text(encoding="utf-8")
    model, engine = out / "model.onnx", out / "model.engine"
    assert check_engine(engine, backend_module="tensorrt", backend_version=VERSION, onnx=model) is not None
    assert json.loads((out / "engine_layers.json").read_text(encoding="utf-8")) == []
    assert not (out / "model.pt2").exists()

    found = told(engine)
    shapes = {"min_shape": [1, 6], "opt_shape": [3, 6], "max_shape": [8, 6]}
    assert found["inputs"] == [{**shapes, "dtype": "torch.float32"}]
    (expected,) = normfuse.load(out)(np.full((3, 6), 0.5, dtype=np.float32)).values()
    # Two products and a sum each, of at most eight terms, rounded in another order.
    np.testing.assert_allclose(found["outputs"][0], expected, rtol=0, atol=16 * 2**-23 * np.abs(expected).max())

    assert run(*arguments(files, plain, "--no-build")).code == 0
    assert (plain / "model.onnx").read_bytes() == model.read_bytes(), "whatever builds the engine, the file is one"


FAILURES = {
    "unsupported": (
        3,
        "torch-tensorrt does not convert the model: Conversion of function torch._ops.aten.aten::erfinv",
    ),
    "crashes": (1, "the builder's process ended with signal 11"),
    "no library": (5, "what torch_tensorrt loads is not installed"),
    "not installed": (5, "torch_tensorrt is not installed"),
}


@pytest.mark.slow
@pytest.mark.parametrize("behaviour", list(FAILURES))
def test_what_fails_costs_nothing_but_the_engine(
    behaviour: str, run: Run, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, said = FAILURES[behaviour]
    if behaviour == "not installed":
        hide_tensorrt(monkeypatch)
    else:
        raises = "OSError('libnvinfer.so.11')" if behaviour == "no library" else ""
        install_torch_tensorrt(tmp_path, monkeypatch, behaviour, RAISES=raises)
    out = tmp_path / "out"
    done = run(*arguments(files, out, *VIA))
    assert done.code == code
    assert done.err.startswith(f"error: {said}")
    assert f"engine: none, {said}" in done.out
    assert run("verify", out).code == 0
    assert (out / "model.onnx").exists()
    assert not (out / "model.engine").exists()
    if behaviour == "not installed":
        assert "pip install 'normfuse[torch-tensorrt]'" in done.err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--bits", "8"), "via cannot be torch-tensorrt beside int8"),
        (("--bits", "fp16"), "via cannot be torch-tensorrt beside fp16"),
        (("--capability", "8.9"), "via cannot be torch-tensorrt beside capability 8.9"),
        (("--target", "onnx"), "via cannot be torch-tensorrt"),
        (("--via", "tensorrt"), "via cannot be 'tensorrt'"),
    ],
)
def test_what_it_does_not_take_is_said_at_once(options: tuple[str, ...], said: str, run: Run, tmp_path: Path) -> None:
    done = run(*arguments(Path("missing"), tmp_path / "out", *VIA, *options))
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith(f"error: {said}")
    assert list(tmp_path.iterdir()) == []
