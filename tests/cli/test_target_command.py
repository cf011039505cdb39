"""``normfuse compile --target trt``: exit codes with, without and with a failing TensorRT; the artifact is kept."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from standin_tensorrt import hide_tensorrt, install_standin
from torch import nn

import normfuse
from normfuse.testing import randomized, seeded

Run = Callable[..., Any]
"""``run`` of ``conftest``: how the command ended."""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    model = randomized(nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 5)))
    normfuse.save(model, [torch.zeros(2, 64)], folder / "model.pt2")
    np.savez(folder / "data.npz", x=torch.randn(16, 64, generator=seeded(1)).numpy())
    return folder


QUICKLY = ("--target", "trt", "--bits", "fp16", "--effort", 0, "--threads", 1, "--max-drop", 100, "-q")


def arguments(files: Path, out: Path, *more: object) -> list[object]:
    return ["compile", files / "model.pt2", "--calib", files / "data.npz", "-o", out, *QUICKLY, *more]


def is_kept(run: Run, out: Path) -> None:
    """The artifact is whole, and without an engine that nobody built."""
    assert run("verify", out).code == 0
    assert (out / "model.onnx").exists()
    assert not (out / "model.engine").exists()


@pytest.mark.slow
def test_without_any_tensorrt_the_file_is_written_and_linted(
    run: Run, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hide_tensorrt(monkeypatch)
    out = tmp_path / "out"
    done = run(*arguments(files, out, "--bits", "8"))
    assert done.code == 5
    assert done.err.startswith("error: tensorrt is not installed")
    assert "pip install 'normfuse[tensorrt]'" in done.err
    for text in (
        "lint: no findings",
        "engine: none, tensorrt is not installed",
        "  build with TensorRT 11: trtexec",
        "verdict: kept",
    ):
        assert text in done.out, text
    assert "│ int8" in done.out
    is_kept(run, out)
    again = run("report", out)
    assert (again.code, again.out) == (0, done.out)
    linted = run("inspect", out, "--lint", "trt", "--json")
    assert (linted.code, linted.found["findings"]) == (0, [])
    assert run("inspect", out).code == 0
    assert not (tmp_path / "out.resume").exists()


@pytest.mark.slow
def test_json_has_the_failure_and_the_artifact_the_same_report(
    run: Run, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hide_tensorrt(monkeypatch)
    done = run(*arguments(files, tmp_path / "out", "--json"))
    assert done.code == 5
    assert done.found["tensorrt"]["failure"]["what"] == "tensorrt is not installed"
    assert done.found["tensorrt"]["engine"] is None
    assert run("report", tmp_path / "out", "--json").found["tensorrt"] == done.found["tensorrt"]


@pytest.mark.slow
def test_no_engine_was_asked_for(run: Run, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hide_tensorrt(monkeypatch)
    done = run(*arguments(files, tmp_path / "out", "--no-build"))
    assert (done.code, done.err) == (0, "")
    assert "engine: none was asked for" in done.out
    is_kept(run, tmp_path / "out")


FAILURES = {
    "refuses": (3, "the parser refuses 1 node"),
    "crashes": (1, "the builder's process ended with signal 11"),
    "hangs": (1, "the builder took more than 1 s"),
    "no driver": (5, "a driver of the GPU is not installed"),
    "no shapes": (2, "shapes are missing or do not fit"),
}


@pytest.mark.slow
@pytest.mark.parametrize("behaviour", list(FAILURES))
def test_a_builder_that_fails_costs_nothing_but_the_engine(
    behaviour: str, run: Run, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, said = FAILURES[behaviour]
    install_standin(tmp_path, monkeypatch, behaviour)
    limit = ["--builder-seconds", 1] if behaviour == "hangs" else []
    done = run(*arguments(files, tmp_path / "out", *limit))
    assert done.code == code
    assert done.err.startswith(f"error: {said}")
    assert f"engine: none, {said}" in done.out
    assert "verdict: kept, ships fp16" in done.out
    is_kept(run, tmp_path / "out")


@pytest.mark.slow
def test_an_engine_is_built_and_shown_again(
    run: Run, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_standin(tmp_path, monkeypatch)
    out = tmp_path / "out"
    done = run(*arguments(files, out))
    assert (done.code, done.err) == (0, "")
    assert "engine: 16 bytes by tensorrt 11.4.0.106" in done.out
    assert "1 kernel; products: 0 of 2 in fp16" in done.out
    assert run("report", out).out == done.out
    assert run("verify", out).code == 0
    engine = bytearray((out / "model.engine").read_bytes())
    engine[3] ^= 1
    (out / "model.engine").write_bytes(engine)
    changed = run("verify", out)
    assert changed.code == 1
    assert "model.engine" in changed.out
    refused = run("report", out)
    assert (refused.code, refused.out) == (4, "")


@pytest.mark.slow
def test_an_artifact_is_replaced_with_its_engine(
    run: Run, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_standin(tmp_path, monkeypatch)
    assert run(*arguments(files, tmp_path / "out")).code == 0
    assert (tmp_path / "out" / "model.engine").exists()
    assert run(*arguments(files, tmp_path / "out", "--no-build")).code == 0
    is_kept(run, tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--capability", "8"), "capability cannot be '8'"),
        (("--capability", "abc"), "capability cannot be 'abc'"),
        (("--shapes", "image"), "'image' gives no input its shapes"),
        (("--builder-level", "9"), "builder_level cannot be 9"),
        (("--workspace", "-1"), "workspace cannot be -1"),
        (("--builder-seconds", "0"), "builder_seconds cannot be 0.0"),
        (("--body", "half"), "body cannot be 'half'"),
        (("--eight-bits", "int4"), "eight_bits cannot be 'int4'"),
        (("--bits", "w4a4"), "bits cannot be w4a4"),
        (("--bits", "fp8", "--effort", "2"), "effort cannot be 2"),
        (("--target", "onnx"), "bits cannot be fp16"),
        (("--target", "onnx", "--bits", "8", "--shapes", "x=1x64"), "shapes cannot be x=1x64"),
        (("--integer-only",), "integer_only cannot be True"),
    ],
)
def test_what_no_builder_takes_is_said_at_once(options: tuple[str, ...], said: str, run: Run, tmp_path: Path) -> None:
    done = run(*arguments(Path("missing"), tmp_path / "out", *options))
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith(f"error: {said}")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--timing-cache", "missing/cache"), "the timing cache cannot be written"),
        (("--shapes", "y=1x64"), "the model has no input y"),
    ],
)
def test_what_does_not_fit_the_model_leaves_nothing(
    options: tuple[str, ...], said: str, run: Run, files: Path, tmp_path: Path
) -> None:
    done = run(*arguments(files, tmp_path / "out", *options))
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith(f"error: {said}")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_bfloat16_on_a_processor_is_refused_with_a_reason(run: Run, files: Path, tmp_path: Path) -> None:
    assert run(*arguments(files, tmp_path / "out", "--bits", "bf16", "--no-build")).code == 0
    done = run("benchmark", tmp_path / "out", "-q")
    assert done.code == 4
    assert "run its engine on its target" in done.err
