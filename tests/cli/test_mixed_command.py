"""``normfuse compile --bits mixed``: budgets that cannot be met, bits by name, the front, and the recipe used again."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import normfuse
from normfuse.testing import Small, randomized, seeded


def forward(m: Any, image: Tensor) -> Tensor:
    x = m.conv(image).relu().flatten(2).transpose(1, 2)  # [batch, 6, 32]
    return m.head(torch.tanh(m.up(x)).mean(dim=1))  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    parts = {"conv": nn.Conv2d(2, 32, 3, 3), "up": nn.Linear(32, 48), "head": nn.Linear(48, 5)}
    model = randomized(Small(forward, **parts))
    normfuse.save(model, [torch.zeros(2, 2, 9, 6)], folder / "model.pt2")
    x = torch.randn(16, 2, 9, 6, generator=seeded(1))
    with torch.no_grad():
        np.savez(folder / "data.npz", x=x.numpy(), label=model(x).argmax(dim=1).numpy())
    return folder


def compiled(files: Path, output: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    quickly = ["--score", "random", "--effort", 0, "--no-benchmark", "--threads", 1, "--max-drop", 100, "-q"]
    given = [files / "model.pt2", "--calib", files / "data.npz", "-o", output, *quickly, *arguments]
    command = [sys.executable, "-m", "normfuse.cli.main", "compile", *map(str, given)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_a_budget_that_cannot_be_met_writes_nothing_and_the_least_that_is_told_is_enough(
    files: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    done = compiled(files, out, "--bits", "mixed", "--budget", "bytes=0.01x avg-bits=8")
    assert (done.returncode, done.stdout) == (2, "")
    first = done.stderr.splitlines()[0]
    assert first.startswith("error: the budget bytes=")
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []
    done = compiled(files, out, "--bits", "mixed", "--budget", f"{first.split()[-1]} avg-bits=8", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["mixed"]["average_weight_bits"] == 4.0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.slow
def test_the_front_is_shown_and_its_recipe_can_be_used_again(files: Path, tmp_path: Path) -> None:
    options = ["--bits", "mixed", "--pareto", "--point", 2, "--eval", files / "data.npz", "--overrides", "head=8"]
    done = compiled(files, tmp_path / "out", *options)
    assert done.returncode == 0, done.stderr
    assert "front:" in done.stdout
    assert "bits chosen by random" in done.stdout
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [point["number"] for point in report["pareto"]["points"] if point["ships"]] == [2]
    assert {each["layer"]: each["overridden"] for each in report["mixed"]["layers"]} == {
        "conv": False,
        "up": False,
        "head": True,
    }
    assert "mixed" in (tmp_path / "out" / "report.html").read_text()
    done = compiled(files, tmp_path / "again", "--recipe", tmp_path / "out" / "recipe.toml")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "again" / "model.onnx").read_bytes() != b""
    assert (tmp_path / "again" / "recipe.toml").read_text() == (tmp_path / "out" / "recipe.toml").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--bits", "mixed"], "mixed bits need a budget"),
        (["--budget", "bytes=0.2x"], "budget cannot be bytes=0.2x"),
        (["--bits", "8", "--overrides", "haed=8"], "did you mean head?"),
    ],
    ids=["no budget", "no mixed bits", "no such layer"],
)
def test_a_wrong_call_has_its_message_and_leaves_nothing(
    options: list[str], said: str, files: Path, tmp_path: Path
) -> None:
    quickly = [] if "mixed" in options else ["--score", "default"]
    done = compiled(files, tmp_path / "out", *options, *quickly)
    assert done.returncode == 2
    assert said in done.stderr
    assert not (tmp_path / "out").exists()
