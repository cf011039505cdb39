"""Artifacts beside the model they come from, whatever kind of file it is, and whatever the folders are called."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn

import normfuse
from normfuse import comparing
from normfuse.bench.comparison import Comparison, Row
from normfuse.cli import inspect
from normfuse.data import Samples
from normfuse.data.samples import Sample
from normfuse.errors import BadInput
from normfuse.loading import load_model
from normfuse.measure import Measured
from normfuse.progress import Advance, Silent
from normfuse.recipe import Recipe
from normfuse.runtime.onnx_session import open_onnx


class Embedding(nn.Module):
    """Two inputs of different types and lengths, so that a wrong order or type fails."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.norm, self.head = nn.Embedding(7, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)

    def forward(self, tokens: Tensor, image: Tensor) -> Tensor:
        logits: Tensor = self.head(self.norm(self.table(tokens).mean(dim=1) + image))
        return logits


def embedding() -> nn.Module:
    """Return the module, for ``arch``."""
    return Embedding()


TOKENS = torch.tensor([[1, 2, 3, 4]] * 2)
IMAGE = torch.randn(2, 5)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("comparing")
    model = Embedding().eval()
    torch.save(model.state_dict(), folder / "state.pt")
    normfuse.save(model, [TOKENS, IMAGE], folder / "model.pt2")
    recipe = Recipe(bits=32, benchmark=False, threads=1)
    normfuse.compile(model, [TOKENS, IMAGE], recipe=recipe).save(folder / "float")
    return folder


def samples(count: int = 6) -> Samples:
    random = np.random.default_rng(0)
    arrays = [
        # Another order, another type and one array more than the model has inputs.
        {"image": random.standard_normal(5), "id": np.asarray(index), "tokens": random.integers(0, 7, 4)}
        for index in range(count)
    ]
    return Samples(
        source="test",
        names=tuple(arrays[0]),
        count=count,
        read=lambda: (Sample(row, f"sample {index}") for index, row in enumerate(arrays)),
        labels=np.arange(count) % 3,
    )


class Watched(Silent):
    """Remembers the tasks."""

    def __init__(self) -> None:
        self.tasks: list[str] = []

    @contextmanager
    def task(self, label: str, total: int | None = None) -> Iterator[Advance]:
        self.tasks.append(label)
        yield lambda steps: None


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[Measured]:
    """What would be measured; the float engines are run once, as long as they are there."""
    found: list[Measured] = []

    def compare(what: Measured, *, batch: int, **rest: Any) -> Comparison:
        found.append(what)
        for engine in what.engines:
            assert engine.path.exists()
            if engine.kind == "onnxruntime":
                session = open_onnx(engine.path, threads=1)
                session(tokens=TOKENS.numpy(), image=IMAGE.numpy())
        rows = tuple(Row(label=engine.label) for engine in what.engines)
        return Comparison(rows=rows, baseline=rows[0].label, batch=batch, threads=1)

    monkeypatch.setattr(comparing, "compare_engines", compare)
    return found


def compare(folders: Sequence[Path], **given: Any) -> list[str]:
    options = {"against": None, "evaluation": None, "progress": Silent(), **given}
    found = comparing.compare_artifacts(folders, batch=1, threads=1, **options)
    return [row["label"] for row in found["comparison"]["rows"]]


@pytest.mark.slow
@pytest.mark.parametrize("with_samples", [True, False])
def test_a_state_dict_is_captured_with_the_artifacts_inputs(
    files: Path, measured: list[Measured], with_samples: bool
) -> None:
    model = load_model(files / "state.pt", arch=f"{__name__}:embedding")
    progress = Watched()
    labels = compare(
        [files / "float"], against=model, evaluation=samples() if with_samples else None, progress=progress
    )
    assert labels[:2] == ["float", "PyTorch eager"]
    reading = ["reading the samples"] if with_samples else []
    assert progress.tasks == [*reading, "building the float baseline"]
    (what,) = measured
    assert (what.evaluation is not None) == with_samples


@pytest.mark.slow
def test_labels_differ_from_the_baselines_and_from_each_other(files: Path, measured: list[Measured]) -> None:
    twice = [files / "float", files / "float"]
    labels = compare(twice, against=load_model(files / "model.pt2"))
    assert labels == ["float", "PyTorch eager", str(twice[0]), f"{twice[0]} (2)"]


def test_a_folder_is_called_by_its_name_where_that_is_enough(
    files: Path, measured: list[Measured], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert compare([files / "float"]) == ["float"]
    monkeypatch.chdir(files)
    assert compare([Path("float"), Path("float"), Path() / "float"]) == ["float", "float (2)", "float (3)"]


def test_labels_that_are_no_classes_are_found_before_anything_is_measured(
    files: Path, measured: list[Measured]
) -> None:
    with pytest.raises(BadInput, match="labels are int64 from 0 to 3") as caught:
        compare([files / "float"], evaluation=replace(samples(), labels=np.arange(6) % 4))
    assert caught.value.where == "test"
    assert measured == []


def test_arrays_that_are_not_used_are_said(files: Path, measured: list[Measured]) -> None:
    found = comparing.compare_artifacts(
        [files / "float"], against=None, evaluation=samples(), batch=1, threads=1, progress=Silent()
    )
    assert found["warnings"] == [
        "test: array 'id' is not used: the inputs are called tokens, image, labels are called label"
    ]


@pytest.mark.parametrize("at", [100, None], ids=["one bit", "one byte more"])
def test_a_damaged_artifact_is_neither_opened_nor_measured(files: Path, tmp_path: Path, at: int | None) -> None:
    shutil.copytree(files / "float", tmp_path / "out")
    content = bytearray((tmp_path / "out" / "model.onnx").read_bytes())
    if at is None:
        content += b"0"
    else:
        content[at] ^= 1
    (tmp_path / "out" / "model.onnx").write_bytes(content)
    with pytest.raises(BadInput, match="not the file that was written"):
        normfuse.load(tmp_path / "out")
    with pytest.raises(BadInput, match="not the file that was written"):
        compare([files / "float", tmp_path / "out"])
    done = CliRunner().invoke(inspect.command, [str(tmp_path / "out"), "--quiet"], standalone_mode=False)
    assert done.return_value == 1
    assert "PROBLEM: model.onnx is not the file that was written" in done.stdout
