"""``normfuse fold``: the folder it writes, what it says, its exit codes, and what ``inspect`` shows before."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import normfuse
from normfuse.rewrite.linear_map import LinearMap
from normfuse.testing import randomized, seeded

Run = Callable[..., Any]
"""``run`` of ``conftest``: how the command ended."""


def network() -> nn.Module:
    parts = [nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.BatchNorm1d(5), nn.Sigmoid()]
    return randomized(nn.Sequential(*parts, nn.LayerNorm(5), nn.Linear(5, 3)))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    normfuse.save(network(), [torch.randn(2, 4)], tmp_path / "model.pt2")
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "data.npz", input=rng.normal(2.0, 1.0, (9, 4)).astype(np.float32))
    return tmp_path / "model.pt2"


def test_it_writes_a_model_that_is_the_original(run: Run, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = run("fold", model, "-o", out, "-q")
    assert done.code == 0, done.err
    assert done.err == ""
    assert {path.name for path in out.iterdir()} == {"model.pt2", "certificate.json", "manifest.json"}
    x = torch.randn((6, 4), generator=seeded(3))
    found = torch.export.load(out / "model.pt2").module()(x)
    # float32: sums of five terms of size one behind a channel that is nearly dead.
    torch.testing.assert_close(found, network()(x), rtol=1e-4, atol=1e-4)
    certificate = json.loads((out / "certificate.json").read_text())
    assert certificate["norms"] == {"before": {"batch_norm": 2, "layer_norm": 1}, "after": {"layer_norm": 1}}
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["kind"] == "fold"
    assert set(manifest["files"]) == {"model.pt2", "certificate.json"}


def test_what_it_shows(run: Run, model: Path, tmp_path: Path) -> None:
    done = run("fold", model, "-o", tmp_path / "out")
    for text in (
        "folds: ",
        "W' = diag(a) W",
        "affines left: ",
        "norms left: ",
        "norms: batch_norm 2",
        "affines: ",
        "random samples",
        "written: ",
    ):
        assert text in done.out
    assert "folding" in done.err


def test_json_is_the_certificate(run: Run, model: Path, tmp_path: Path) -> None:
    done = run("fold", model, "-o", tmp_path / "out", "--json", "-q")
    assert done.found == json.loads((tmp_path / "out" / "certificate.json").read_text())


def test_verify_and_inspect_know_what_it_wrote(run: Run, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run("fold", model, "-o", out, "-q")
    done = run("verify", out)
    assert done.code == 0, done.out
    shown = run("inspect", out)
    assert shown.code == 0, shown.err
    assert "folded model = original" in shown.out
    assert run("inspect", out, "--json").found["problems"] == []
    (out / "model.pt2").write_bytes(b"changed")
    done = run("verify", out)
    assert done.code == 1
    assert "model.pt2 is not the file that was written" in done.out
    assert run("inspect", out).code == 1


def test_a_folded_folder_is_no_engine(run: Run, model: Path, tmp_path: Path) -> None:
    run("fold", model, "-o", tmp_path / "out", "-q")
    done = run("benchmark", tmp_path / "out", "-q")
    assert done.code == 4
    assert "no engine" in done.err
    assert "model.pt2" in done.err


def test_inspect_shows_the_same_before(run: Run, model: Path, tmp_path: Path) -> None:
    before = run("inspect", model, "--json", "-q").found["certificate"]
    after = run("fold", model, "-o", tmp_path / "out", "--json", "-q").found
    assert before == after
    assert "folds: " in run("inspect", model, "-q").out
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["out"], "inspect writes nothing"


def test_inspect_shows_the_same_with_the_same_options(run: Run, model: Path, tmp_path: Path) -> None:
    options = ["--calib", tmp_path / "data.npz", "--samples", "3", "--layer-norm", "keep", "--refresh-norms"]
    before = run("inspect", model, *options, "--json", "-q").found["certificate"]
    assert before == run("fold", model, *options, "-o", tmp_path / "out", "--json", "-q").found
    assert before["refreshed"] == 2
    assert run("inspect", model, "--seed", 7, "--json", "-q").found["certificate"]["samples"]["origin"].endswith("7")


def test_data_and_options(run: Run, model: Path, tmp_path: Path) -> None:
    arguments = ["--calib", tmp_path / "data.npz", "--samples", "4", "--layer-norm", "keep", "--refresh-norms"]
    done = run("fold", model, *arguments, "-o", tmp_path / "out", "--json", "-q")
    assert done.code == 0, done.err
    assert done.found["refreshed"] == 2
    assert done.found["samples"]["count"] == 4
    assert done.found["samples"]["origin"].endswith("data.npz")
    assert done.found["norms"]["after"] == {"layer_norm": 1}
    assert (
        run("fold", model, "--seed", 7, "-o", tmp_path / "out", "--json", "-q").found["samples"]["origin"].endswith("7")
    )


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--refresh-norms"], 2, "--calib"),
        (["--samples", "0"], 2, "samples"),
        (["--layer-norm", "batch"], 2, "rms"),
        (["--calib", "nowhere.npz"], 4, "nowhere.npz"),
        (["--preprocess", "imagenet"], 2, "preprocess"),
    ],
)
def test_bad_options_leave_nothing(
    run: Run, model: Path, tmp_path: Path, arguments: list[str], code: int, said: str
) -> None:
    done = run("fold", model, *arguments, "-o", tmp_path / "out", "-q")
    assert done.code == code
    assert said in done.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.npz", "model.pt2"]


def test_a_missing_model(run: Run, tmp_path: Path) -> None:
    done = run("fold", tmp_path / "missing.pt2", "-o", tmp_path / "out", "-q")
    assert done.code == 4
    assert "missing.pt2" in done.err
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_cannot_be_written_is_refused_before_the_work(run: Run, model: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    done = run("fold", model, "-o", tmp_path / "mine")
    assert done.code == 2
    assert "no normfuse artifact" in done.err
    assert "loading" not in done.err
    done = run("fold", model, "-o", tmp_path / "data.npz" / "out", "-q")
    assert done.code == 2
    assert "cannot be written" in done.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.npz", "mine", "model.pt2"]
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_a_disk_that_is_full_leaves_the_older_artifact(
    run: Run, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    run("fold", model, "-o", out, "-q")
    before = (out / "certificate.json").read_bytes()

    def full(self: Path, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    done = run("fold", model, "--seed", 7, "-o", out, "-q")
    assert done.code == 4
    assert "No space left" in done.err
    assert (out / "certificate.json").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.npz", "model.pt2", "out"]


def test_a_fold_that_is_undone_is_exit_code_1(
    run: Run, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = LinearMap.behind

    def wrong(self: LinearMap, found: Any) -> LinearMap:
        made = right(self, found)
        made.weight.mul_(1 + 1e-6)
        return made

    monkeypatch.setattr(LinearMap, "behind", wrong)
    done = run("fold", model, "-o", tmp_path / "out")
    assert done.code == 1
    assert "UNDONE: fold-behind-linear" in done.out
    found = json.loads((tmp_path / "out" / "certificate.json").read_text())
    assert found["holds"] is False
    assert found["error"]["float64"] < 1e-12, "what was written is right all the same"
    x = torch.randn((6, 4), generator=seeded(3))
    loaded = torch.export.load(tmp_path / "out" / "model.pt2").module()
    torch.testing.assert_close(loaded(x), network()(x), rtol=1e-4, atol=1e-4)
    assert run("inspect", model, "-q").code == 1
