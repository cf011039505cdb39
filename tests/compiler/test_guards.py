"""What must stop a compile or make it fall back, and what it says then."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import normfuse
from normfuse import build
from normfuse.checks import Check, check_codes
from normfuse.data import Samples
from normfuse.data.samples import Sample
from normfuse.errors import BadInput, CheckFailed
from normfuse.page import render_page
from normfuse.recipe import Recipe

INT8 = Recipe(benchmark=False, threads=1)
FLOAT = Recipe(benchmark=False, threads=1, bits=32)


class Perceptron(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(12, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).relu())


class Generated(Perceptron):
    """A product whose weight is an activation: no target runs it in integers."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.up(x)
        return self.down(nn.functional.linear(hidden, hidden.mean(dim=0) * torch.ones(16, 1)))


def samples(
    count: int = 6, *, width: int = 12, labels: list[int] | None = None, broken_at: int | None = None
) -> Samples:
    rows = np.random.default_rng(0).standard_normal((count, width)).astype(np.float32)
    if broken_at is not None:
        rows[broken_at, 3] = np.nan
    return Samples(
        source="rows.npz",
        names=("x",),
        count=count,
        read=lambda: (Sample({"x": row}, f"sample {index}") for index, row in enumerate(rows)),
        labels=None if labels is None else np.array(labels),
    )


EXAMPLE = [torch.zeros(2, 12)]


def broken(check: Callable[..., Any]) -> Callable[..., Any]:
    def found(*arguments: Any, **named: Any) -> Any:
        real = check(*arguments, **named)
        return replace(real, value=math.nan) if isinstance(real, Check) else [replace(each, value=2.0) for each in real]

    return found


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [INT8, FLOAT], ids=["int8", "float"])
@pytest.mark.parametrize("name", ["check_fold", "check_export"])
def test_a_float_engine_that_is_not_the_model_is_never_built(
    monkeypatch: pytest.MonkeyPatch, name: str, recipe: Recipe
) -> None:
    monkeypatch.setattr(build, name, broken(getattr(build, name)))
    with pytest.raises(CheckFailed) as caught:
        normfuse.compile(Perceptron(), EXAMPLE, calibration=samples(), recipe=recipe)
    assert caught.value.exit_code == 1
    assert ("folded model" if name == "check_fold" else "float engine") in caught.value.what


@pytest.mark.slow
def test_an_int8_engine_that_is_not_its_simulation_falls_back_and_every_failed_check_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(build, "check_codes", broken(check_codes))
    built = normfuse.compile(Perceptron(), EXAMPLE, calibration=samples(), recipe=INT8)
    assert (built.report["verdict"]["verdict"], built.report["verdict"]["ships"]) == ("fell back", "float")
    assert built.report["verdict"]["reasons"][:2] == [
        "a check failed: engine's codes = simulation's",
        "a check failed: engine's outputs = simulation's",
    ]
    assert not built.holds
    assert built.engine.ranges is None


@pytest.mark.slow
def test_a_linear_map_that_had_to_stay_float_is_partly_kept() -> None:
    built = normfuse.compile(Generated(), EXAMPLE, calibration=samples(), recipe=INT8)
    assert built.report["verdict"]["verdict"] == "partly kept"
    assert built.report["verdict"]["reasons"][0].startswith("left in float: ")
    assert built.report["verdict"]["ships"] == "int8"
    assert built.holds


class OfFour(Perceptron):
    """A model that fixes its batch."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + torch.arange(4.0)[:, None]


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [INT8, FLOAT], ids=["int8", "float"])
@pytest.mark.parametrize(("count", "limit"), [(3, 0), (8, 3)], ids=["too few", "limited to too few"])
def test_too_few_samples_for_one_batch_are_refused(recipe: Recipe, count: int, limit: int) -> None:
    with pytest.raises(BadInput, match="takes batches of 4, there are 3 samples"):
        normfuse.compile(
            OfFour(), [torch.zeros(4, 12)], calibration=samples(count), recipe=replace(recipe, samples=limit)
        )


@pytest.mark.slow
def test_of_a_fixed_batch_samples_are_counted_and_not_batches() -> None:
    built = normfuse.compile(OfFour(), [torch.zeros(4, 12)], calibration=samples(9), recipe=INT8)
    assert [check["detail"][:9] for check in built.report["checks"][:2]] == ["8 samples", "8 samples"]
    assert built.report["quantization"]["samples"] == 8


@pytest.mark.parametrize(
    ("evaluation", "says"),
    [
        pytest.param(samples(width=11), "shape", id="shape"),
        pytest.param(
            samples(labels=[0, 1, 2, 3, 0, 1]), r"labels are int64 from 0 to 3\n  at        rows\.npz\n", id="labels"
        ),
        pytest.param(samples(broken_at=5), r"nan\n  at        sample 5", id="not finite"),
    ],
)
def test_bad_evaluation_data_is_found_before_the_work(
    monkeypatch: pytest.MonkeyPatch, evaluation: Samples, says: str
) -> None:
    monkeypatch.setattr("normfuse.compiler.build_float", pytest.fail)
    with pytest.raises(BadInput, match=says):
        normfuse.compile(Perceptron(), EXAMPLE, calibration=samples(), evaluation=evaluation, recipe=INT8)


@pytest.mark.slow
def test_what_the_samples_lack_stands_in_the_report(tmp_path: Path) -> None:
    rows = {"x": np.zeros((20, 12), np.float32), "y": np.arange(20) % 3}
    built = normfuse.compile(Perceptron(), calibration=rows, evaluation=rows, recipe=INT8)
    assert [text.partition(":")[2].split(":")[0] for text in built.report["warnings"]] == [
        " array 'y' is not used",
        " input x is 0 everywhere",
        " array 'y' is not used",
        " there are no labels, so accuracy was not measured and outputs were compared instead",
    ]
    assert "Warning: evaluation: array &#x27;y&#x27; is not used" in render_page(built.report)


@pytest.mark.slow
def test_the_report_counts_constants_by_their_type_and_knows_the_file(tmp_path: Path) -> None:
    normfuse.save(Perceptron(), EXAMPLE, tmp_path / "model.pt")
    built = normfuse.compile(tmp_path / "model.pt", calibration=samples(), recipe=INT8)
    counts = built.report["quantization"]["constants_by_type"]
    # Weights, and the zero points of both layers' output channels.
    assert counts["int8"] == (12 * 16 + 16 * 3) + (16 + 3)
    assert counts["float32"] < 100, "scales only"
    assert counts["int32"] == 2 * (16 + 3), "biases and their zero points"
    assert built.report["model"]["kind"] == "torch.export archive"
    assert len(built.report["model"]["sha256"]) == 64


@pytest.mark.slow
def test_the_callers_generator_is_left_alone() -> None:
    model = Perceptron()
    before = torch.get_rng_state()
    normfuse.compile(model, EXAMPLE, recipe=FLOAT)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.slow
def test_a_model_with_its_constants_beside_it_keeps_the_name_that_it_knows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("normfuse.export.saving.LARGEST_SINGLE_FILE", 100)

    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(12, 900)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x)

    built = normfuse.compile(Wide(), EXAMPLE, calibration=samples(), recipe=INT8)
    built.save(tmp_path / "out")
    assert {"model.onnx", "model.onnx.data"} <= {path.name for path in (tmp_path / "out").iterdir()}
    assert normfuse.load(tmp_path / "out")(np.zeros((2, 12), np.float32))["output"].shape == (2, 900)
    sizes = {row["label"]: row["file_bytes"] for row in built.report["comparison"]["rows"]}
    assert sizes["float"] > 4 * 12 * 900
