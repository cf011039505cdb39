"""Engines run by a process of its own, with a stand-in for TensorRT that computes on the host."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper
from standin_runtime import RUNTIME
from standin_tensorrt import tensorrt_library

from normfuse.bench.engine_runs import EngineJob, EngineRuns, run_engines
from normfuse.bench.gpu_timing import GpuSchedule
from normfuse.errors import BadInput, CheckFailed, MissingDependency, UnsupportedModel
from normfuse.quant.target import Via
from normfuse.runtime.engine_sidecar import Sidecar, onnx_sums, sidecar_path, sidecar_text
from normfuse.runtime.tensorrt_backend import Backend

STANDIN = Backend("standin_trt", "pip install standin")
VERSION = "11.4.0.106"
QUICK = GpuSchedule(rounds=2, warm_up_ms=1.0, seconds=0.0, least=3, alone=2)
X = np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    install(tmp_path)
    return tmp_path


def install(folder: Path, runs: str = "as it should") -> None:
    text = tensorrt_library() + RUNTIME.replace('"as it should"', repr(runs), 1)
    (folder / "standin_trt.py").write_text(text, encoding="utf-8")


def engine(folder: Path, factor: float = 2.0, name: str = "model", **changed: Any) -> EngineJob:
    """Write y = factor * x, an ONNX file that is its own engine, and its sidecar."""
    ports = [helper.make_tensor_value_info(each, TensorProto.FLOAT, ["batch", 4]) for each in ("x/in", "y:out")]
    nodes = [helper.make_node("Mul", ["x/in", "factor"], ["y:out"])]
    constants = [helper.make_tensor("factor", TensorProto.FLOAT, [], [factor])]
    graph = helper.make_graph(nodes, "g", ports[:1], ports[1:], constants)
    data = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10).SerializeToString()
    onnx, path = folder / f"{name}.onnx", folder / f"{name}.engine"
    onnx.write_bytes(data)
    path.write_bytes(data)
    facts: dict[str, Any] = {
        "sha256": hashlib.sha256(data).hexdigest(),
        "flavour": STANDIN.module,
        "via": Via.ONNX,
        "version": VERSION,
        "capabilities": ("SM89",),
        "onnx_sha256": onnx_sums(onnx)[0],
        "weights_sha256": None,
        "shapes": {"x/in": ((1, 4), (3, 4), (8, 4))},
        "workspace_bytes": 1 << 20,
        "level": 3,
        "version_compatible": False,
        "messages": (),
    }
    sidecar_path(path).write_text(sidecar_text(Sidecar(**{**facts, **changed})), encoding="utf-8")
    return EngineJob(label=name, engine=path, onnx=onnx, feeds={"x/in": X})


def ran(*jobs: EngineJob, trust: bool = False) -> EngineRuns:
    return run_engines(jobs, STANDIN, schedule=QUICK, trust=trust, device="cpu")


def test_engines_compute_what_they_compute_and_are_timed_in_turns(folder: Path) -> None:
    found = ran(engine(folder, 2.0, "twice"), engine(folder, -3.0, "thrice"))
    assert [each.label for each in found.runs] == ["twice", "thrice"]
    for each, factor in zip(found.runs, (2.0, -3.0), strict=True):
        np.testing.assert_array_equal(each.outputs["y:out"], X * np.float32(factor))
        assert each.plain["n"] == 6, "two rounds of three"
        assert 0 < each.plain["gpu_ms"]["min"] <= each.plain["gpu_ms"]["median"] <= each.plain["gpu_ms"]["p99"]
        assert each.graph is None
        assert "without a GPU" in each.no_graph
    assert found.device["type"] == "cpu"


def test_an_engine_that_is_not_its_sidecars_is_never_loaded(folder: Path) -> None:
    install(folder, "ends")  # as soon as anything is loaded
    job = engine(folder)
    job.engine.write_bytes(job.engine.read_bytes() + b"\0")
    for trust in (False, True):
        with pytest.raises(BadInput, match="not the file that its sidecar was written for"):
            ran(job, trust=trust)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"flavour": "tensorrt_rtx"}, "built by tensorrt_rtx"),
        ({"version": "10.13.2.6"}, "built by standin_trt 10.13.2.6"),
        ({"onnx_sha256": "0" * 64}, "another ONNX file"),
    ],
)
def test_an_engine_of_something_else_is_never_loaded(folder: Path, changed: dict[str, Any], says: str) -> None:
    install(folder, "ends")
    with pytest.raises(BadInput, match=says):
        ran(engine(folder, **changed))


def test_without_a_sidecar_it_is_trusted_or_not_loaded(folder: Path) -> None:
    job = engine(folder)
    sidecar_path(job.engine).unlink()
    with pytest.raises(BadInput, match="no sidecar"):
        ran(job)
    np.testing.assert_array_equal(ran(job, trust=True).runs[0].outputs["y:out"], 2 * X)


@pytest.mark.parametrize(
    ("runs", "kind", "says"),
    [
        ("no room", UnsupportedModel, "cannot be run: CUDA out of memory"),
        ("other shapes", BadInput, r"shape \[3, 4\]: not in the profile"),
        ("by values", UnsupportedModel, "output y:out depends on values"),
        ("strange type", UnsupportedModel, "x/in is INT4"),
        ("refuses", CheckFailed, "does not run: an illegal address"),
        ("ends", CheckFailed, "the engine's process ended with signal 11"),
    ],
)
def test_what_goes_wrong_is_told(folder: Path, runs: str, kind: type[Exception], says: str) -> None:
    install(folder, runs)
    with pytest.raises(kind, match=says):
        ran(engine(folder))


def test_what_is_no_engine_is_told(folder: Path) -> None:
    job = engine(folder)
    job.engine.write_bytes(b"no plan")
    sidecar_path(job.engine).unlink()
    with pytest.raises(BadInput, match="does not load the engine: magic tag does not match"):
        ran(job, trust=True)


@pytest.mark.parametrize("feeds", [{}, {"x/in": X, "z": X}, {"x/in": X.astype(np.float64)}])
def test_inputs_that_do_not_fit_are_refused(folder: Path, feeds: dict[str, Any]) -> None:
    job = engine(folder)
    with pytest.raises(BadInput, match=r"inputs given are|is float64"):
        ran(EngineJob(label="a", engine=job.engine, onnx=job.onnx, feeds=feeds))


def test_a_library_that_does_not_load_is_missing(folder: Path) -> None:
    (folder / "standin_trt.py").write_text("raise ImportError('libnvinfer.so.11: cannot open shared object file')")
    with pytest.raises(MissingDependency, match=r"libnvinfer\.so\.11"):
        ran(engine(folder))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU that PyTorch can use")
def test_a_cuda_graph_computes_what_its_call_does() -> None:
    from normfuse.bench.cuda_graph import recorded

    given = torch.randn(5, 7, device="cuda")
    with torch.cuda.stream(torch.cuda.Stream()):
        replay = recorded(lambda: given * 2)
        given.fill_(3.0)
        found = replay()
        torch.cuda.synchronize()
    assert torch.equal(found.cpu(), torch.full((5, 7), 6.0))
