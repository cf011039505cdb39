"""Modules captured from samples: arrays find their parameters; archives are written whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import normfuse
from normfuse.capturing import capture_model
from normfuse.data import Samples, load_samples
from normfuse.errors import BadInput, UnsupportedModel, UsageError


class Tokens(nn.Module):
    """Two inputs that cannot be swapped, and one that may be left out."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(11, 8), nn.Linear(8, 3)

    def forward(self, ids: Tensor, mask: Tensor, shift: Tensor | None = None) -> Tensor:
        x = self.head(self.embedding(ids) * mask[..., None])
        return x if shift is None else x + shift


class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


def data(folder: Path, **arrays: np.ndarray) -> Samples:
    np.savez(folder / "data.npz", **arrays)  # type: ignore[arg-type]  # its own options are not among the names
    return load_samples(folder / "data.npz")


IDS = np.random.default_rng(0).integers(0, 11, (3, 5))
MASK = np.random.default_rng(1).random((3, 5))


def test_arrays_in_another_order_and_one_too_many_find_their_parameters(tmp_path: Path) -> None:
    found = capture_model(Tokens(), samples=data(tmp_path, number=np.arange(3), mask=MASK, ids=IDS))
    assert [(spec.name, spec.dtype) for spec in found.input_specs] == [("ids", torch.int64), ("mask", torch.float32)]


def test_an_optional_input_is_taken_where_there_is_an_array_for_it(tmp_path: Path) -> None:
    found = capture_model(Tokens(), samples=data(tmp_path, shift=np.zeros((3, 5, 3)), mask=MASK, ids=IDS))
    assert found.input_names == ("ids", "mask", "shift")


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_traced_modules_know_their_parameters_too(tmp_path: Path) -> None:
    model = torch.jit.trace(Tokens().eval(), (torch.from_numpy(IDS), torch.from_numpy(MASK).float()))  # type: ignore[no-untyped-call]
    found = capture_model(model, samples=data(tmp_path, mask=MASK, ids=IDS))
    assert [spec.dtype for spec in found.input_specs] == [torch.int64, torch.float32]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_single_array_of_any_name_and_width_is_the_input(tmp_path: Path, dtype: torch.dtype) -> None:
    found = capture_model(Head().to(dtype), samples=data(tmp_path, rows=np.zeros((3, 7), np.float64)))
    assert [(spec.name, spec.dtype) for spec in found.input_specs] == [("x", dtype)]


def test_a_missing_array_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadInput) as caught:
        capture_model(Tokens(), samples=data(tmp_path, ids=IDS, masks=MASK))
    assert "ids, masks" in str(caught.value)
    assert "ids, mask, shift" in str(caught.value)
    assert "data.npz" in str(caught.value)


def test_samples_of_a_wrong_shape_are_the_users_mistake_and_training_mode_stays(tmp_path: Path) -> None:
    model = Head().train()
    with pytest.raises(BadInput, match="cannot run on the first sample") as caught:
        capture_model(model, samples=data(tmp_path, x=np.zeros((3, 9))))
    assert "float32[1, 9]" in str(caught.value)
    assert model.training
    assert model.linear.training


def test_a_model_that_runs_and_cannot_be_captured_is_no_mistake_of_the_samples(tmp_path: Path) -> None:
    class Branching(Head):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if x.sum() > 0 else x

    with pytest.raises(UnsupportedModel):
        capture_model(Branching(), samples=data(tmp_path, x=np.zeros((3, 7))))


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_without_inputs_both_ways_to_give_them_are_named(tmp_path: Path) -> None:
    torch.jit.script(Head()).save(str(tmp_path / "scripted.pt"))  # type: ignore[no-untyped-call]
    with pytest.raises(UsageError) as caught:
        capture_model(tmp_path / "scripted.pt")
    assert "--calib" in caught.value.hint
    assert "example_inputs" in caught.value.hint
    assert caught.value.where.endswith("scripted.pt")


WEIGHTS = {"linear.weight": torch.zeros(3, 7), "linear.bias": torch.zeros(3)}


@pytest.mark.parametrize("model", [WEIGHTS, Head, None])
def test_what_is_no_module_is_said(tmp_path: Path, model: Any) -> None:
    with pytest.raises(UsageError, match="the model is a") as caught:
        normfuse.save(model, [torch.zeros(2, 7)], tmp_path / "model.pt2")
    assert ("load_state_dict" in caught.value.hint) == (model is WEIGHTS)
    with pytest.raises(UsageError, match="the model is a"):
        capture_model(model, [torch.zeros(2, 7)])
    assert list(tmp_path.iterdir()) == []


def test_example_inputs_by_name_or_alone(tmp_path: Path) -> None:
    normfuse.save(Tokens(), {"mask": torch.from_numpy(MASK).float(), "ids": torch.from_numpy(IDS)}, tmp_path / "t.pt2")
    assert capture_model(tmp_path / "t.pt2").input_names == ("ids", "mask")
    normfuse.save(Head(), torch.zeros(2, 7), tmp_path / "h.pt2")
    assert capture_model(tmp_path / "h.pt2").input_names == ("x",)


@pytest.mark.parametrize("names", [("ids",), ("ids", "masks"), ("ids", "mask", "number")])
def test_example_inputs_of_other_names_are_named(names: tuple[str, ...]) -> None:
    with pytest.raises(BadInput, match=f"the arrays are called {', '.join(names)}") as caught:
        capture_model(Tokens(), {name: torch.from_numpy(IDS) for name in names})
    assert "ids, mask, shift" in caught.value.expected


def test_save_into_a_folder_that_is_missing_is_bad_input(tmp_path: Path) -> None:
    target = tmp_path / "missing" / "model.pt"
    with pytest.raises(BadInput, match="cannot be written") as caught:
        normfuse.save(Head(), [torch.zeros(2, 7)], target)
    assert str(target) in str(caught.value)


def test_save_on_a_full_disk_keeps_the_older_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.pt").write_bytes(b"older")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(BadInput, match="No space left"):
        normfuse.save(Head(), [torch.zeros(2, 7)], tmp_path / "model.pt")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("model.pt", b"older")]
