"""What ``normfuse score`` writes, prints and reads back; nothing that it finds in place of its own file is believed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn

import normfuse
from normfuse import atomic, scoring
from normfuse.cli.score import command
from normfuse.errors import BadInput, UsageError
from normfuse.recipe import Recipe
from normfuse.runtime.instruction_set import InstructionSet
from normfuse.scoring import score_model
from normfuse.sensitivity import methods
from normfuse.sensitivity.methods import scores_of
from normfuse.strict_json import strict_json
from normfuse.testing import Small, randomized, seeded

ONE = Recipe(bits="mixed", pareto=True, score="curvature")


def forward(m: Any, image: Tensor) -> Tensor:
    x = m.conv(image).relu().flatten(2).transpose(1, 2)  # [batch, 6, 9]
    return m.head(torch.tanh(m.up(x)).mean(dim=1))  # type: ignore[no-any-return]


def network() -> nn.Module:
    return randomized(Small(forward, conv=nn.Conv2d(2, 9, 3, 3), up=nn.Linear(9, 13), head=nn.Linear(13, 3)))


def data(seed: int = 1) -> dict[str, Any]:
    return {"x": torch.randn(12, 2, 9, 6, generator=seeded(seed)).numpy()}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    normfuse.save(network(), [torch.zeros(2, 2, 9, 6)], folder / "model.pt2")
    np.savez(folder / "calib.npz", **data())
    np.savez(folder / "other.npz", **data(2))
    return folder


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The scores that were computed, in order."""
    found = list[str]()

    def watched(subject: Any, wanted: Any, **options: Any) -> Any:
        found.extend(method.value for method in wanted)
        return scores_of(subject, wanted, **options)

    monkeypatch.setattr(scoring, "scores_of", watched)
    return found


def score(files: Path, *arguments: object, calib: str = "calib.npz") -> str:
    """What the command prints."""
    given = [str(files / "model.pt2"), "--calib", str(files / calib), "-q", *map(str, arguments)]
    done = CliRunner().invoke(command, given, standalone_mode=False)
    if done.exception is not None:
        raise done.exception
    assert done.return_value == 0
    return done.stdout


@pytest.mark.slow
def test_the_file_holds_the_damage_of_every_part(files: Path, tmp_path: Path) -> None:
    out = tmp_path / "sensitivity.json"
    shown = score(files, "-o", out, "--weight-widths", "2,4,8", "--activation-widths", "4,8")
    found = json.loads(out.read_text())
    assert list(found) == ["format", "key", "method", "facts", "samples", "layers", "sha256"]
    assert (found["format"], found["method"]) == ("normfuse sensitivity 1", "curvature")
    assert found["samples"] == 6, "as many others are left to judge"
    parts = {(each["layer"], each["kind"]): each for each in found["layers"]}
    assert {layer for layer, kind in parts if kind == "weight"} == {"conv", "up", "head"}
    named = {layer for layer, kind in parts if kind == "activation"}
    assert named == {"up", "head"}, "activations are told by who reads them; an image has eight bits"
    for (_, kind), each in parts.items():
        assert set(each) == {"layer", "kind", "node", "damage", "share"}
        costs = [each["damage"][width] for width in (("2", "4", "8") if kind == "weight" else ("4", "8"))]
        assert costs == sorted(costs, reverse=True)
        assert all(cost >= 0 for cost in costs)
    assert sum(each["share"] for each in found["layers"]) == pytest.approx(1)
    assert "head" in shown
    assert [path.name for path in tmp_path.iterdir()] == ["sensitivity.json"]


@pytest.mark.slow
def test_json_is_what_the_file_holds(files: Path, tmp_path: Path) -> None:
    shown = json.loads(score(files, "-o", tmp_path / "out.json", "--json", "--method", "sqnr"))
    assert shown == json.loads((tmp_path / "out.json").read_text())
    assert shown["method"] == "sqnr"
    assert json.loads(score(files, "--json", "--method", "sqnr"))["layers"] == shown["layers"]


@pytest.mark.slow
def test_a_second_call_reads_the_file(files: Path, tmp_path: Path, computed: list[str]) -> None:
    out = tmp_path / "sensitivity.json"
    first = score(files, "-o", out)
    written = out.read_bytes()
    assert score(files, "-o", out) == first
    assert (computed, out.read_bytes()) == (["curvature"], written)


@pytest.mark.slow
@pytest.mark.parametrize(
    "other",
    [
        {"calib": "other.npz"},
        {"arguments": ["--method", "lrp"]},
        {"arguments": ["--weight-widths", "3,8"]},
        {"arguments": ["--seed", 1]},
        {"arguments": ["--samples", 6]},
    ],
    ids=["data", "method", "widths", "seed", "samples"],
)
def test_what_belongs_to_something_else_is_computed_anew(
    other: dict[str, Any], files: Path, tmp_path: Path, computed: list[str]
) -> None:
    out = tmp_path / "sensitivity.json"
    score(files, "-o", out)
    before = json.loads(out.read_text())
    score(files, "-o", out, *other.get("arguments", []), calib=other.get("calib", "calib.npz"))
    assert len(computed) == 2
    after = json.loads(out.read_text())
    assert after["key"] != before["key"]
    assert after["layers"] != before["layers"]


@pytest.mark.slow
def test_the_target_is_part_of_what_is_scored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = []
    for level in (InstructionSet.AVX2, InstructionSet.AVX512_VNNI):
        monkeypatch.setattr(scoring, "detect_instruction_set", lambda level=level: level)
        keys.append(score_model(network(), calibration=data(), recipe=ONE)["key"])
    assert keys[0]["recipe"] != keys[1]["recipe"]


def changed(found: dict[str, Any]) -> str:
    found["layers"][0]["damage"]["4"] = 123.0
    return strict_json(found)


def renamed(found: dict[str, Any]) -> str:
    return strict_json({**found, "layers": "none of your business"})


def unsealed(found: dict[str, Any]) -> str:
    del found["sha256"]
    return strict_json(found)


@pytest.fixture(scope="module")
def known() -> dict[str, Any]:
    return score_model(network(), calibration=data(), recipe=ONE)


@pytest.mark.parametrize(
    "damage",
    [
        lambda found: strict_json(found)[:-9],
        lambda found: "",
        lambda found: "[" * 100_000,
        lambda found: '{"format": ' + '{"a": ' * 100_000,
        lambda found: "[]",
        lambda found: '"normfuse sensitivity 1"',
        lambda found: "\0\ud800",
        lambda found: strict_json({**found, "format": "normfuse sensitivity 0"}),
        lambda found: strict_json({**found, "key": None}),
        changed,
        renamed,
        unsealed,
    ],
    ids=["cut", "empty", "deep", "deep objects", "list", "text", "bytes", "format", "key", "number", "layers", "seal"],
)
def test_a_file_that_is_not_what_was_written_is_not_read(
    damage: Callable[[dict[str, Any]], str], known: dict[str, Any], tmp_path: Path
) -> None:
    path = tmp_path / "known.json"
    path.write_text(strict_json(known), encoding="utf-8")
    assert scoring._read(path, known["key"]) == json.loads(strict_json(known))
    path.write_bytes(damage(json.loads(strict_json(known))).encode("utf-8", errors="surrogatepass"))
    assert scoring._read(path, known["key"]) is None


def test_no_file_and_a_folder_are_no_score(known: dict[str, Any], tmp_path: Path) -> None:
    assert scoring._read(tmp_path / "missing.json", known["key"]) is None
    assert scoring._read(tmp_path, known["key"]) is None


@pytest.mark.slow
def test_a_file_of_somebody_else_is_replaced(files: Path, tmp_path: Path, computed: list[str]) -> None:
    out = tmp_path / "sensitivity.json"
    out.write_text('{"format": "normfuse sensitivity 1", "key": {}, "layers": [{"layer": "\\u001b[2Jhead"}]}')
    assert "\x1b" not in score(files, "-o", out)
    assert computed == ["curvature"]
    assert json.loads(out.read_text())["layers"][0]["layer"] == "conv"


def test_a_score_needs_samples(files: Path) -> None:
    given = [str(files / "model.pt2"), "-q"]
    done = CliRunner().invoke(command, given, standalone_mode=False)
    assert isinstance(done.exception, UsageError)
    assert "a score needs calibration data" in done.exception.what
    assert (done.exception.hint, done.exception.exit_code) == ("--calib DATA", 2)


def test_a_score_is_one(files: Path) -> None:
    with pytest.raises(UsageError, match="one score is needed"):
        score(files, "--method", "default")
    with pytest.raises(UsageError) as caught:
        score(files, "--method", "curvatur")
    assert caught.value.hint == "did you mean curvature?"


def test_a_folder_is_no_output(files: Path, tmp_path: Path) -> None:
    with pytest.raises(click.UsageError, match="directory"):
        score(files, "-o", tmp_path)


@pytest.mark.slow
def test_what_is_finished_is_kept_until_the_file_is_written(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*given: Any) -> None:
        raise BadInput("the disk is full")

    out, scored = tmp_path / "sensitivity.json", list[object]()
    with monkeypatch.context() as patch:
        patch.setattr(atomic, "write_file", full)
        with pytest.raises(BadInput, match="the disk is full"):
            score(files, "-o", out)
    assert [path.name for path in tmp_path.iterdir()] == ["sensitivity.json.resume"]
    monkeypatch.setattr(methods, "score", lambda *given, **options: scored.append(given))
    score(files, "-o", out)
    assert scored == []
    assert [path.name for path in tmp_path.iterdir()] == ["sensitivity.json"]
