"""``normfuse report``: what compile and fold printed, printed again; and a Triton model repository."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import normfuse
from normfuse.artifact import ArtifactWriter
from normfuse.cli import render
from normfuse.testing import randomized, seeded

Run = Callable[..., Any]
"""``run`` of ``conftest``: how the command ended."""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """A report, and the artifact that holds it."""
    folder = tmp_path_factory.mktemp("built") / "small"
    model = randomized(nn.Sequential(nn.Linear(12, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3)))
    samples = torch.randn(32, 12, generator=seeded(0))
    made = normfuse.compile(model, calibration=samples, recipe=normfuse.Recipe(bits=8, min_speedup=0.0))
    made.save(folder)
    return made.report, folder


@pytest.mark.slow
def test_it_prints_what_compile_printed(
    run: Run, built: tuple[dict[str, Any], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    report, folder = built
    render.report(report, folder)
    expected = capsys.readouterr().out
    done = run("report", folder)
    assert done.code == 0, done.err
    assert done.out == expected
    assert run("report", folder, "--json").found == json.loads((folder / "report.json").read_text(encoding="utf-8"))


@pytest.mark.slow
def test_it_writes_a_repository(run: Run, built: tuple[dict[str, Any], Path], tmp_path: Path) -> None:
    _, folder = built
    done = run("report", folder, "--triton-repository", tmp_path / "models", "--max-batch", 4, "--instances", 2)
    assert done.code == 0, done.err
    assert "onnxruntime backend, batches of up to 4, instances: 2" in done.out
    assert sorted(path.name for path in (tmp_path / "models" / "small").iterdir()) == ["1", "config.pbtxt"]
    done = run("report", folder, "--triton-repository", tmp_path / "models", "--name", "other", "--json", "-q")
    assert done.found["name"] == "other"
    assert done.found["files"] == ["config.pbtxt", "1/model.onnx"]
    done = run("report", folder, "--triton-repository", tmp_path / "models", "--engine")
    assert done.code == 2
    assert "there is none" in done.err
    done = run("report", folder, "--triton-repository", tmp_path / "models", "--name", "a/b")
    assert done.code == 2


def test_a_folded_model_shows_its_certificate_again(run: Run, tmp_path: Path) -> None:
    model = randomized(nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5)))
    normfuse.save(model, [torch.randn(2, 4, generator=seeded(0))], tmp_path / "model.pt2")
    wrote = run("fold", tmp_path / "model.pt2", "-o", tmp_path / "out", "-q")
    assert run("report", tmp_path / "out").out == wrote.out
    done = run("report", tmp_path / "out", "--triton-repository", tmp_path / "models")
    assert done.code == 4
    assert "no engine" in done.err


def write(folder: Path, report: object, **facts: object) -> Path:
    (folder / "built.onnx").write_bytes(b"onnx")
    with ArtifactWriter(folder / "out") as writer:
        writer.add_file(folder / "built.onnx", "model.onnx")
        writer.add_json("report.json", report)
        writer.finish({"verdict": {"verdict": "kept"}, **facts})
    return folder / "out"


def test_a_damaged_artifact_is_not_shown(run: Run, tmp_path: Path) -> None:
    folder = write(tmp_path, {"verdict": {}})
    (folder / "report.json").write_text("{}", encoding="utf-8")
    done = run("report", folder)
    assert (done.code, done.out) == (4, "")
    assert "report.json is not the file that was written" in done.err


def test_a_report_of_another_kind_is_no_bug(run: Run, tmp_path: Path) -> None:
    done = run("report", write(tmp_path, {"verdict": {}}))
    assert done.code == 4
    assert "the report lacks accuracy_control, checks" in done.err


def test_a_model_that_is_no_onnx_is_bad_input(run: Run, tmp_path: Path) -> None:
    done = run("report", write(tmp_path, {}), "--triton-repository", tmp_path / "models")
    assert done.code == 4
    assert "cannot be read as ONNX" in done.err


@pytest.mark.parametrize("option", [("--name", "x"), ("--max-batch", "0"), ("--instances", "1"), ("--no-engine",)])
def test_how_to_serve_without_a_repository_is_a_mistake(run: Run, tmp_path: Path, option: tuple[str, ...]) -> None:
    done = run("report", write(tmp_path, {}), *option)
    assert done.code == 2
    assert "--triton-repository" in done.err


def test_figures_that_json_does_not_have_are_shown_as_none(capsys: pytest.CaptureFixture[str]) -> None:
    row = {"label": "float", "peak_bytes": None, "file_bytes": 4, "agreement": None}
    found = {
        "passes": [],
        "quantization": {},
        "checks": [{"holds": False, "name": "same", "value": None, "bound": 0.5, "detail": "of it"}],
        "accuracy_control": None,
        "comparison": {"batch": 1, "threads": 1, "baseline": "float", "rows": [row]},
        "verdict": {"verdict": "fell back", "ships": "float", "reasons": []},
    }
    render.report(found, Path("out"))
    assert "FAILS" in capsys.readouterr().out
