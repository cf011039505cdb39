"""``normfuse compile --integer-only``: from a trained model to an artifact without floats, and what it refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn

import normfuse
from examples.zoo.data import make
from examples.zoo.train import WEIGHTS
from normfuse.artifact import verify_artifact
from normfuse.build import FOLDING
from normfuse.capturing import capture_model
from normfuse.cli.compile import command
from normfuse.errors import UnsupportedModel, UsageError
from normfuse.export.float_tensors import float_tensors
from normfuse.inspection import inspect_artifact
from normfuse.integer_engine import build_integers
from normfuse.loading import load_model
from normfuse.progress import Silent
from normfuse.quant.integer_forms import GeluForm, SoftmaxForm
from normfuse.recipe import Recipe
from normfuse.testing import Small, randomized, seeded

MODEL = WEIGHTS / "glyphs_vit_un.pt2"
SAMPLES = 4
QUICKLY = ["--integer-only", "--no-benchmark", "--threads", "1", "-q"]


def images(split: str, count: int) -> Tensor:
    return make("glyphs", split, count, 0)[0]


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], Path]:
    """What the command printed, and the folder that it wrote."""
    folder = tmp_path_factory.mktemp("integers")
    np.savez(folder / "calib.npz", image=images("calib", SAMPLES).numpy())
    given = [MODEL, "--calib", folder / "calib.npz", "-o", folder / "out", *QUICKLY, "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "normfuse.cli.main", "compile", *map(str, given)],
        capture_output=True,
        text=True,
        check=False,
    )
    return done, folder / "out"


Artifact = tuple[subprocess.CompletedProcess[str], Path]


@pytest.mark.slow
def test_the_report(artifact: Artifact) -> None:
    done, folder = artifact
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["verdict"]["ships"] == "integers"
    assert report["verdict"]["verdict"] == "kept"
    assert all(check["holds"] for check in report["checks"])
    named = {check["name"]: check["value"] for check in report["checks"]}
    assert named["engine's outputs = reference's, values that differ"] == 0
    assert named["float tensors inside the engine"] == 0
    assert [row["label"] for row in report["comparison"]["rows"]] == ["float", "integers"]
    applied = {step["name"]: step["applied"] for step in report["passes"]}
    assert applied["lower-to-integers"]["int_attention"] == 5
    assert json.loads((folder / "report.json").read_text())["verdict"] == report["verdict"]


@pytest.mark.slow
def test_the_artifact(artifact: Artifact) -> None:
    _, folder = artifact
    names = {path.name for path in folder.iterdir()}
    assert names == {"model.onnx", "manifest.json", "recipe.toml", "ranges.json", "report.json", "report.html"}
    assert verify_artifact(folder) == []
    assert Recipe.read(folder / "recipe.toml").integer_only
    assert float_tensors(folder / "model.onnx") == []
    assert "integers" in (folder / "report.html").read_text()


@pytest.mark.slow
def test_it_has_the_bits_of_the_reference(artifact: Artifact, tmp_path: Path) -> None:
    """The reference is built here a second time, in another process than the artifact was."""
    _, folder = artifact
    samples, test = images("calib", SAMPLES), images("test", 17)
    graph = capture_model(load_model(MODEL))
    FOLDING.run(graph)
    engine = build_integers(
        graph,
        lambda: ([each[None]] for each in samples),
        tmp_path / "again.onnx",
        recipe=Recipe(integer_only=True),
        total=SAMPLES,
        threads=1,
        progress=Silent(),
    )
    (wanted,) = engine.graph.run(test)
    (found,) = normfuse.load(folder, threads=1).run({"image": test.numpy()}).values()
    assert np.array_equal(found, wanted.numpy())
    assert (tmp_path / "again.onnx").read_bytes() == (folder / "model.onnx").read_bytes()


CONTRADICTIONS: dict[str, tuple[list[str], str]] = {
    "float": (["--bits", "32"], "bits cannot be 32"),
    "4-bit activations": (["--bits", "w4a4"], "bits cannot be w4a4"),
    "mixed": (["--bits", "mixed", "--budget", "bytes=0.2x"], "bits cannot be mixed"),
    "dynamic": (["--activations", "dynamic"], "activations cannot be dynamic"),
    "overrides": (["--overrides", "head=8"], "overrides cannot be head=8"),
    "tables": (["--table-bits", "4"], "table_bits cannot be 4"),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a layer in the middle that has no integer form, and data."""

    class Middle(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.cumsum(1)

    def forward(m: Any, x: Tensor) -> Tensor:
        return m.head(m.middle(m.stem(x)))  # type: ignore[no-any-return]

    folder = tmp_path_factory.mktemp("files")
    network = randomized(Small(forward, stem=nn.Linear(7, 6), middle=Middle(), head=nn.Linear(6, 5)))
    normfuse.save(network, [torch.zeros(2, 3, 7)], folder / "model.pt2")
    np.savez(folder / "data.npz", x=torch.randn(8, 3, 7, generator=seeded(1)).numpy())
    return folder


@pytest.mark.parametrize(("options", "said"), CONTRADICTIONS.values(), ids=CONTRADICTIONS)
def test_options_that_contradict_it(options: list[str], said: str, files: Path, tmp_path: Path) -> None:
    given = [files / "model.pt2", "--calib", files / "data.npz", "-o", tmp_path / "out", *QUICKLY, *options]
    done = CliRunner().invoke(command, list(map(str, given)), standalone_mode=False)
    assert isinstance(done.exception, UsageError)
    assert done.exception.exit_code == 2
    assert done.exception.what == said
    assert "integer_only" in done.exception.expected
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("line", ["rotate = true", "equalize = true", 'weights = "asymmetric"'])
def test_recipes_that_contradict_it(line: str, files: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text(f"{line}\n")
    given = [files / "model.pt2", "--calib", files / "data.npz", "--recipe", tmp_path / "recipe.toml"]
    done = CliRunner().invoke(command, [*map(str, given), "-o", str(tmp_path / "out"), *QUICKLY], standalone_mode=False)
    assert isinstance(done.exception, UsageError)
    assert done.exception.what.startswith(f"{line.split(maxsplit=1)[0]} cannot be ")
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.toml"]


@pytest.mark.parametrize(
    ("option", "form"), [("norm", "per-token"), ("softmax", "shiftmax"), ("gelu", "lambda-shift-gelu")]
)
def test_forms_need_integers_alone(option: str, form: str, files: Path, tmp_path: Path) -> None:
    given = [files / "model.pt2", "--calib", files / "data.npz", "-o", tmp_path / "out", f"--{option}", form]
    done = CliRunner().invoke(command, list(map(str, given)), standalone_mode=False)
    assert isinstance(done.exception, UsageError)
    assert done.exception.exit_code == 2
    assert done.exception.what == f"{option} cannot be {form}"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_forms_that_were_asked_for(tmp_path: Path) -> None:
    np.savez(tmp_path / "calib.npz", image=images("calib", SAMPLES).numpy())
    given = [MODEL, "--calib", tmp_path / "calib.npz", "-o", tmp_path / "out", *QUICKLY]
    done = CliRunner().invoke(
        command, [*map(str, given), "--softmax", "shiftmax", "--gelu", "shift-gelu"], standalone_mode=False
    )
    assert done.exception is None
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["verdict"]["ships"] == "integers"
    applied = {step["name"]: step["applied"] for step in report["passes"]}
    assert applied["lower-to-integers"]["shiftmax"] == applied["lower-to-integers"]["shift_gelu"] == 5
    assert not {"int_attention", "int_linear_table", "int_table"} & applied["lower-to-integers"].keys()
    assert float_tensors(tmp_path / "out" / "model.onnx") == []
    recipe = Recipe.read(tmp_path / "out" / "recipe.toml")
    assert (recipe.softmax, recipe.gelu) == (SoftmaxForm.SHIFTMAX, GeluForm.SHIFT)
    page = (tmp_path / "out" / "report.html").read_text()
    assert "shiftmax" in page
    assert "shift-gelu" in page


@pytest.mark.slow
def test_a_model_that_has_no_integer_form_is_refused_by_its_layer_and_leaves_nothing(
    files: Path, tmp_path: Path
) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    given = [files / "model.pt2", "--calib", files / "data.npz", "-o", tmp_path / "out", *QUICKLY]
    done = subprocess.run(
        [sys.executable, "-m", "normfuse.cli.main", "compile", *map(str, given)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "TMPDIR": str(temporary)},
    )
    assert done.returncode == UnsupportedModel.exit_code
    assert done.stderr.startswith("error: aten.cumsum has no integer form\n  at        middle\n")
    assert "--allow-float-islands" in done.stderr
    assert "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["temporary"]
    assert not any(path.is_file() and path.suffix == ".onnx" for path in temporary.rglob("*"))


@pytest.mark.slow
def test_what_has_no_integer_form_stays_float_where_that_is_allowed(files: Path, tmp_path: Path) -> None:
    given = [files / "model.pt2", "--calib", files / "data.npz", "-o", tmp_path / "out", *QUICKLY]
    done = CliRunner().invoke(command, [*map(str, given), "--allow-float-islands", "--json"], standalone_mode=False)
    assert done.exception is None, done.exception
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["verdict"]["verdict"] == "partly kept"
    assert "left in float: middle" in report["verdict"]["reasons"]
    refused = [each for step in report["passes"] if step["name"] == "lower-to-integers" for each in step["refused"]]
    assert [(each["layer"], each["detail"]) for each in refused] == [("middle", "aten.cumsum has no integer form")]
    assert "has no integer form" in (tmp_path / "out" / "report.html").read_text()
    assert inspect_artifact(tmp_path / "out")["float_tensors"]
