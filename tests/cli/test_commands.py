"""The command line on bad and good input: messages, exit codes, nothing half-written."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import normfuse


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.fc = nn.BatchNorm1d(12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.norm(x))


def tiny() -> nn.Module:
    """Return the module, for ``--arch``."""
    return Tiny()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    torch.manual_seed(0)
    model = Tiny().eval()
    normfuse.save(model, [torch.randn(2, 12)], folder / "model.pt")
    torch.save(model, folder / "pickled.pt")
    whole = (folder / "model.pt").read_bytes()
    (folder / "truncated.pt").write_bytes(whole[: len(whole) // 2])
    (folder / "text.pt").write_text("this is no model")
    data = np.random.default_rng(0).standard_normal((16, 12)).astype(np.float32)
    np.savez(folder / "data.npz", x=data, label=np.arange(16) % 3)
    broken = data.copy()
    broken[5, 2] = np.nan
    np.savez(folder / "nan.npz", x=broken)
    np.savez(folder / "wide.npz", x=np.zeros((4, 13), dtype=np.float32))
    (folder / "empty").mkdir()
    return folder


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "normfuse.cli.main", *map(str, arguments)], capture_output=True, text=True, check=False
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "data", "code", "said"),
    [
        ("truncated.pt", "data.npz", 4, "truncated.pt"),
        ("pickled.pt", "data.npz", 4, "--trust-pickle"),
        ("text.pt", "data.npz", 4, "text.pt"),
        ("missing.pt", "data.npz", 4, "missing.pt"),
        ("model.pt", "nan.npz", 4, "sample 5"),
        ("model.pt", "wide.npz", 4, "13"),
        ("model.pt", "empty", 4, "empty"),
        ("model.pt", "nowhere.npz", 4, "nowhere.npz"),
    ],
)
def test_bad_input_has_its_message_and_code_and_leaves_nothing(
    files: Path, tmp_path: Path, model: str, data: str, code: int, said: str
) -> None:
    done = run("compile", files / model, "--calib", files / data, "-o", tmp_path / "out", "-q", "--no-benchmark")
    assert done.returncode == code, done.stderr
    assert done.stderr.startswith("error: ")
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_an_output_that_cannot_be_written(files: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    done = run("compile", files / "model.pt", "--calib", files / "data.npz", "-o", tmp_path / "mine")
    assert done.returncode == 2
    assert "no normfuse artifact" in done.stderr
    (tmp_path / "file").write_text("")
    done = run("compile", files / "model.pt", "--calib", files / "data.npz", "-o", tmp_path / "file" / "out")
    assert done.returncode == 2
    assert "cannot be written" in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "mine"]
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "precious"


@pytest.mark.slow
def test_the_whole_way(files: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["--calib", files / "data.npz", "--eval", files / "data.npz", "--min-speedup", "0", "--max-drop", "100"]
    done = run("compile", files / "model.pt", *arguments, "-o", out, "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["verdict"]["ships"] == "int8"
    assert {row["label"] for row in report["comparison"]["rows"]} == {"float", "int8"}
    assert all(row["p50_ms"] > 0 and row["top_1"] is not None for row in report["comparison"]["rows"])
    names = {path.name for path in out.iterdir()}
    assert names == {"model.onnx", "manifest.json", "recipe.toml", "ranges.json", "report.json", "report.html"}

    assert run("verify", out).returncode == 0
    assert json.loads(run("inspect", out, "--json").stdout)["problems"] == []
    measured = run("benchmark", out, "--against", files / "model.pt", "--json", "-q")
    assert measured.returncode == 0, measured.stderr
    labels = [row["label"] for row in json.loads(measured.stdout)["comparison"]["rows"]]
    assert labels == ["float", "PyTorch eager", "out"]

    (out / "model.onnx").write_bytes(b"changed")
    done = run("verify", out)
    assert done.returncode == 1
    assert "model.onnx" in done.stdout


@pytest.mark.slow
def test_a_state_dict_with_its_factory(files: Path, tmp_path: Path) -> None:
    torch.save(Tiny().state_dict(), tmp_path / "state.pt")
    arguments = ["--arch", "test_commands:tiny", "--calib", files / "data.npz", "--no-benchmark", "-q"]
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "normfuse.cli.main",
            "compile",
            "../state.pt",
            *map(str, arguments),
            "-o",
            tmp_path / "out",
        ],
        capture_output=True,
        text=True,
        check=False,
        cwd=_with_factory(tmp_path),
    )
    assert done.returncode == 0, done.stderr


def _with_factory(folder: Path) -> Path:
    (folder / "code").mkdir()
    (folder / "code" / "test_commands.py").write_text(Path(__file__).read_text())
    return folder / "code"


@pytest.mark.slow
def test_inspect_shows_the_folds_of_a_model(files: Path) -> None:
    found = json.loads(run("inspect", files / "model.pt", "--json", "--text").stdout)
    (site,) = found["certificate"]["sites"]
    assert (site["affine"], site["into"], site["formula"]) == ("norm", "fc", "W' = W diag(a), b' = b + W c")
    assert "normfuse.affine" not in found["operators_folded"]
    assert "aten.linear" in found["text"]


@pytest.mark.slow
def test_help_is_instant_and_doctor_answers() -> None:
    script = (
        "import sys; sys.argv = ['normfuse', '--help']\n"
        "from normfuse.cli.main import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(run("doctor", "--json").stdout)
    assert found["ok"]
    assert found["environment"]["packages"]["torch"].startswith("2.")


def test_an_unknown_command_is_a_usage_error() -> None:
    done = run("compil")
    assert done.returncode == 2


@pytest.mark.slow
def test_inspect_lints_a_folder_and_a_file(files: Path, tmp_path: Path) -> None:
    out = tmp_path / "int8"
    run("compile", files / "model.pt", "--calib", files / "data.npz", "-o", out, "--no-benchmark")
    for engine in (out, out / "model.onnx"):
        done = run("inspect", engine, "--lint", "trt", "--json")
        assert done.returncode == 1
        assert {each["rule"] for each in json.loads(done.stdout)["findings"]} >= {"zero-point", "unsigned-codes"}
    shown = run("inspect", out, "--lint", "trt").stdout
    assert "error: codes have a zero point that is not 0 (zero-point)" in shown
    assert "try  use symmetric codes" in shown


def test_inspect_lints_what_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_text("nothing of the kind")
    assert run("inspect", tmp_path / "model.onnx", "--lint", "trt").returncode == 4
    assert run("inspect", tmp_path / "model.onnx", "--lint", "coreml").returncode == 2
