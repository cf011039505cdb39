"""What is shown of a damaged artifact: its problems, and no figures of other files."""

from __future__ import annotations

from pathlib import Path

import pytest

from normfuse.artifact import ArtifactWriter
from normfuse.cli import render
from normfuse.inspection import inspect_artifact

ROW = {"label": "int8", "peak_bytes": None, "file_bytes": 4, "top_1": 12.5, "agreement": None}
REPORT = {
    "comparison": {"batch": 1, "threads": 1, "baseline": "int8", "rows": [ROW]},
    "verdict": {"verdict": "kept", "reasons": [], "ships": "int8"},
}


def write(folder: Path, report: object) -> Path:
    (folder / "built.onnx").write_bytes(b"onnx")
    with ArtifactWriter(folder / "out") as writer:
        writer.add_file(folder / "built.onnx", "model.onnx")
        writer.add_json("report.json", report)
        writer.finish({"verdict": {"verdict": "kept"}})
    return folder / "out"


def test_a_whole_artifact_shows_its_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    render.inspection(inspect_artifact(write(tmp_path, REPORT)))
    shown = capsys.readouterr().out
    assert "12.50" in shown
    assert "verdict: kept" in shown


def test_the_score_stands_under_its_name(capsys: pytest.CaptureFixture[str]) -> None:
    render.comparison(REPORT)
    assert "top-1" in capsys.readouterr().out
    row = {**ROW, "top_1": None, "mean_iou": 71.7}
    render.comparison({"comparison": {"batch": 1, "threads": 1, "baseline": "int8", "rows": [row]}})
    shown = capsys.readouterr().out
    assert "IoU" in shown
    assert "71.70" in shown
    assert "top-1" not in shown


def test_warnings_are_shown_beside_the_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    render.inspection(inspect_artifact(write(tmp_path, {**REPORT, "warnings": ["array 'y' is not used"]})))
    assert "warning: array 'y' is not used" in capsys.readouterr().out


@pytest.mark.parametrize("content", ["{}", '{"comparison": {}, "verdict": 3}'])
def test_a_changed_report_is_a_problem_and_not_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str
) -> None:
    folder = write(tmp_path, REPORT)
    (folder / "report.json").write_text(content)
    render.inspection(inspect_artifact(folder))
    shown = capsys.readouterr().out
    assert "PROBLEM: report.json is not the file that was written" in shown
    assert "the report is not shown" in shown


def test_a_report_of_somebody_else_is_not_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    render.inspection(inspect_artifact(write(tmp_path, {})))
    assert "the report is not shown" in capsys.readouterr().out
