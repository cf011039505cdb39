"""What compile and benchmark show of an engine that runs, with a stand-in for TensorRT that computes on the host."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from standin_runtime import RUNTIME
from standin_tensorrt import VERSION, install_standin
from torch import nn

import normfuse
from normfuse.bench.gpu_timing import GpuSchedule
from normfuse.manifest import sha256_of
from normfuse.quant.target import Via
from normfuse.runtime.engine_sidecar import Sidecar, sidecar_path, sidecar_text
from normfuse.testing import Small, randomized, seeded

Run = Callable[..., Any]
"""``run`` of ``conftest``: how the command ended."""

PLACES = ("normfuse.target_engine", "normfuse.comparing")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    model = randomized(nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 5)))
    normfuse.save(model, [torch.zeros(2, 64)], folder / "model.pt2")
    np.savez(folder / "data.npz", x=torch.randn(16, 64, generator=seeded(1)).numpy())
    return folder


@pytest.fixture(autouse=True)
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host stands in for the GPU, and is timed for a moment."""
    for place in PLACES:
        monkeypatch.setattr(f"{place}.device_at_hand", lambda: "cpu")
    quick = GpuSchedule(rounds=2, warm_up_ms=1.0, seconds=0.0, least=3, alone=2)
    monkeypatch.setattr("normfuse.running_engines.GpuSchedule", lambda: quick)


def compiled(run: Run, files: Path, out: Path, *more: object) -> Any:
    options = ("--target", "trt", "--effort", 0, "--threads", 1, "--max-drop", 100, "-q", *more)
    return run("compile", files / "model.pt2", "--calib", files / "data.npz", "-o", out, *options)


@pytest.mark.slow
def test_an_engine_is_run_timed_and_compared(
    run: Run, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_standin(tmp_path, monkeypatch, runtime=RUNTIME)
    done = compiled(run, files, tmp_path / "int8", "--bits", 8, "--shapes", "input=1x64,3x64,5x64", "--json")
    assert (done.code, done.err) == (0, "")
    (found,) = done.found["tensorrt"]["run"]["engines"]
    assert found["inputs"] == {"input": [3, 64]}, "the usual shape"
    assert found["output_error"] == 0.0, "the stand-in is onnxruntime"
    assert found["plain"]["n"] == 6
    assert found["graph"] is None
    said = run("report", tmp_path / "int8").out
    assert "GPU compute on cpu, plain: median" in said
    assert "outputs differ from onnxruntime's by 0 of the largest (at most 0.031)" in said
    assert "Run on cpu" in (tmp_path / "int8" / "report.html").read_text()


@pytest.mark.slow
def test_an_engine_that_was_just_built_needs_no_key_to_be_run(
    run: Run, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_standin(tmp_path, monkeypatch, runtime=RUNTIME)
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "file"))
    assert compiled(run, files, tmp_path / "out", "--bits", 32).code == 0
    assert "GPU compute on cpu" in run("report", tmp_path / "out").out
    refused = run("benchmark", tmp_path / "out", "--engine", "-q")
    assert (refused.code, "built elsewhere" in refused.err) == (4, True)


@pytest.mark.slow
def test_engines_side_by_side(run: Run, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_standin(tmp_path, monkeypatch, runtime=RUNTIME)
    folders = [tmp_path / name for name in ("float", "int8")]
    for folder, bits in zip(folders, (32, 8), strict=True):
        assert compiled(run, files, folder, "--bits", bits, "--no-benchmark").code == 0
    assert "not run: --no-benchmark" in run("report", folders[0]).out
    found = run("benchmark", *folders, "--engine", "--json", "-q").found
    assert [each["label"] for each in found["engines"]] == ["float", "int8"]
    assert [each["inputs"]["input"] for each in found["engines"]] == [[1, 64]] * 2, "what is usual without --shapes"
    assert found["engines"][0]["against_first"] is None
    assert found["engines"][1]["against_first"] > 0
    shown = run("benchmark", *folders, "--engine", "--batch", 2, "-q").out
    assert shown.count("input 2x64: outputs differ from onnxruntime's by ") == 2
    assert "int8\n  input" in shown
    assert shown.count("no CUDA graph: there are no CUDA graphs without a GPU") == 2


@pytest.mark.slow
def test_an_engine_of_trtexec_is_run_where_it_is_trusted(
    run: Run, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_standin(tmp_path, monkeypatch, runtime=RUNTIME)
    out = tmp_path / "out"
    assert compiled(run, files, out, "--bits", "fp16", "--no-build").code == 0
    without = run("benchmark", out, "--engine", "-q")
    assert (without.code, "the artifact has no engine" in without.err) == (4, True)

    (out / "model.engine").write_bytes((out / "model.onnx").read_bytes())
    refused = run("benchmark", out, "--engine", "-q")
    assert (refused.code, "the engine has no sidecar" in refused.err) == (4, True)
    trusted = run("benchmark", out, "--engine", "--trust-engine", "--json", "-q")
    assert trusted.code == 0
    (found,) = trusted.found["engines"]
    assert found["inputs"] == {"input": [1, 64]}, "what it was built for is not known"


@pytest.mark.slow
def test_an_engine_that_computes_something_else_fails(
    run: Run, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_standin(tmp_path, monkeypatch, runtime=RUNTIME.replace('"as it should"', '"backwards"', 1))
    done = compiled(run, files, tmp_path / "out", "--bits", 32)
    assert done.code == 1
    assert done.err.startswith("error: the engine's outputs differ from onnxruntime's by ")
    assert "engine: none, the engine's outputs differ from onnxruntime's by " in done.out
    assert not (tmp_path / "out" / "model.engine").exists(), "it does not ship"
    assert run("verify", tmp_path / "out").code == 0
    again = run("report", tmp_path / "out", "--json").found["tensorrt"]
    assert (again["engine"], again["failure"]["expected"]) == (None, "at most 0.031")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("runs", "told"),
    [("ends", (1, "the engine's process ended with signal 11")), ("other shapes", (4, "not in the profile"))],
)
def test_an_engine_that_does_not_run_does_not_ship(
    runs: str, told: tuple[int, str], run: Run, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_standin(tmp_path, monkeypatch, runtime=RUNTIME.replace('"as it should"', repr(runs), 1))
    done = compiled(run, files, tmp_path / "out", "--bits", 32)
    assert (done.code, told[1] in done.out) == (told[0], True)
    assert not (tmp_path / "out" / "model.engine").exists()
    assert run("verify", tmp_path / "out").code == 0


@pytest.mark.slow
@pytest.mark.parametrize(("order", "code"), [((0, 1), 0), ((1, 0), 1)])
def test_outputs_of_torch_tensorrt_are_compared_in_their_order(
    order: tuple[int, int], code: int, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_standin(tmp_path, monkeypatch, runtime=RUNTIME)
    model = Small(lambda m, x: (m.up(x), -m.up(x).exp()), up=nn.Linear(64, 5))
    normfuse.save(randomized(model), [torch.zeros(2, 64)], tmp_path / "model.pt2")
    np.savez(tmp_path / "data.npz", x=torch.randn(16, 64, generator=seeded(1)).numpy())
    out = tmp_path / "out"
    assert compiled(run, tmp_path, out, "--bits", 32, "--no-build").code == 0

    plan = onnx.load(out / "model.onnx")
    for index, output in enumerate(plan.graph.output):
        plan.graph.node.append(onnx.helper.make_node("Identity", [output.name], [f"output{order[index]}"]))
        output.name = f"output{order[index]}"
    engine = out / "model.engine"
    onnx.save(plan, engine)
    sidecar = Sidecar(
        sha256=sha256_of(engine),
        flavour="tensorrt",
        via=Via.TORCH_TENSORRT,
        version=VERSION,
        capabilities=(),
        onnx_sha256=sha256_of(out / "model.onnx"),
        weights_sha256=None,
        shapes={"x": ((1, 64), (3, 64), (8, 64))},
        workspace_bytes=1,
        level=3,
        version_compatible=False,
        messages=(),
    )
    sidecar_path(engine).write_text(sidecar_text(sidecar), encoding="utf-8")
    assert run("benchmark", out, "--engine", "-q").code == code


@pytest.mark.slow
def test_an_engine_of_somebody_else_is_run_where_it_is_trusted(
    run: Run, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_standin(tmp_path, monkeypatch, runtime=RUNTIME)
    out = tmp_path / "out"
    assert compiled(run, files, out, "--bits", 32, "--no-benchmark").code == 0
    assert run("benchmark", out, "--engine", "-q").code == 0
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "somebody else"))
    refused = run("benchmark", out, "--engine", "-q")
    assert (refused.code, "the engine was built elsewhere" in refused.err) == (4, True)
    assert run("benchmark", out, "--engine", "--trust-engine", "-q").code == 0

    monkeypatch.setattr("normfuse.comparing.device_at_hand", lambda: None)
    refused = run("benchmark", out, "--engine", "-q")
    assert (refused.code, "the engine was built elsewhere" in refused.err) == (4, True), "which needs no GPU to be told"
    without = run("benchmark", out, "--engine", "--trust-engine", "-q")
    assert (without.code, "a GPU that PyTorch can use" in without.err) == (5, True)


def test_what_says_nothing_of_engines_is_refused(run: Run, tmp_path: Path) -> None:
    done = run("benchmark", tmp_path, "--engine", "--against", "model.pt2", "--threads", 2, "-q")
    assert (done.code, "--against and --threads cannot stand beside --engine" in done.err) == (2, True)
    done = run("benchmark", tmp_path, "--trust-engine", "-q")
    assert (done.code, "--trust-engine cannot stand without --engine" in done.err) == (2, True)
