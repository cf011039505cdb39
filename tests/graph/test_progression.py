"""PRepBN folds when its progression has ended, and says why it does not before."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normfuse
from normfuse import fold
from normfuse.errors import UnsupportedModel
from normfuse.folding import Folded
from normfuse.graph.progression import unfinished_steps
from normfuse.nn import PRepBN, RepBN
from normfuse.testing import Small, distance, randomized, seeded


def sample() -> Tensor:
    return torch.randn((2, 7, 5), generator=seeded(9), dtype=torch.float64)


def norm(left: int) -> PRepBN:
    made = PRepBN(5, total_step=12)
    made.iter.fill_(left)
    return made


class Inner(nn.Module):
    def __init__(self, left: int) -> None:
        super().__init__()
        self.norm, self.fc = norm(left), nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.norm(x))  # type: ignore[no-any-return]


MODELS: dict[str, Any] = {
    "at the top": lambda left: nn.Sequential(norm(left), nn.Linear(5, 3)),
    "nested": lambda left: nn.Sequential(nn.Sequential(nn.Tanh(), Inner(left)), nn.Tanh(), nn.Linear(5, 3)),
    "called like another": lambda left: Small(
        lambda m, x: m.norm_b(m.norm(x)), norm=nn.Identity(), norm_b=nn.Sequential(norm(left), nn.Linear(5, 3))
    ),
}


def traced(model: nn.Module) -> torch.jit.ScriptModule:
    return torch.jit.trace(model, sample())  # type: ignore[no-untyped-call, no-any-return]


def both(model: nn.Module, folder: Path) -> list[Folded]:
    normfuse.save(model, [sample()], folder / "model.pt2")
    return [fold(model, (sample(),)), fold(folder / "model.pt2")]


@pytest.mark.parametrize("name", MODELS)
def test_unfinished_it_is_refused_from_module_and_file(name: str, tmp_path: Path) -> None:
    model = randomized(MODELS[name](4)).double()
    for folded in both(model, tmp_path):
        (refusal,) = [each for each in folded.certificate["left"] if each["reason"] == "progression"]
        assert refusal["because"] == "its progressive replacement has not ended"
        assert "4" in refusal["detail"]
        assert "norm" in refusal["layer"] or refusal["layer"].startswith("0")
        assert folded.certificate["norms"]["after"] == {"batch_norm": 1}
        assert folded.holds, "what is left is what it was"
        assert distance([folded.module(sample())], [model(sample())]) < 1e-12


@pytest.mark.parametrize("name", MODELS)
def test_unfinished_it_stays_refused_however_often_it_is_folded(name: str, tmp_path: Path) -> None:
    model = randomized(MODELS[name](4)).double()
    first = fold(model, (sample(),))
    first.save(tmp_path / "out")
    second = fold(first.module, (sample(),))
    second.save(tmp_path / "twice")
    again = [second, fold(copy.deepcopy(first.module), (sample(),)), fold(second.module, (sample(),))]
    again += [fold(tmp_path / "out" / "model.pt2"), fold(tmp_path / "twice" / "model.pt2")]
    for folded in again:
        assert "progression" in {each["reason"] for each in folded.certificate["left"]}
        assert folded.certificate["notes"] == first.certificate["notes"]
        assert folded.certificate["norms"]["after"] == {"batch_norm": 1}
        assert distance([folded.module(sample())], [model(sample())]) < 1e-12


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
@pytest.mark.parametrize("name", MODELS)
def test_unfinished_it_is_refused_as_a_whole_from_torchscript(name: str, tmp_path: Path) -> None:
    torch.jit.save(traced(randomized(MODELS[name](4)).double()), tmp_path / "model.pt")  # type: ignore[no-untyped-call]
    with pytest.raises(UnsupportedModel, match="1 PRepBN layers still mix in layer norm"):
        fold(tmp_path / "model.pt", (sample(),))


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
@pytest.mark.parametrize("name", MODELS)
def test_finished_it_folds_from_torchscript(name: str) -> None:
    assert fold(traced(randomized(MODELS[name](0)).double()), (sample(),)).certificate["norms"]["after"] == {}


@pytest.mark.parametrize("name", MODELS)
def test_finished_it_folds(name: str, tmp_path: Path) -> None:
    model = randomized(MODELS[name](0)).double()
    for folded in both(model, tmp_path):
        assert folded.certificate["norms"]["after"] == {}
        assert folded.certificate["left"] == []
        assert folded.certificate["affines"] == {"found": 1, "folded": 1, "left": 0}
        assert distance([folded.module(sample())], [model(sample())]) < 1e-10


def test_the_model_may_be_the_norm_itself() -> None:
    folded = fold(randomized(norm(3)).double(), (sample(),))
    assert "progression" in {each["reason"] for each in folded.certificate["left"]}


def test_one_of_two_is_unfinished() -> None:
    model = randomized(nn.Sequential(norm(0), nn.Linear(5, 5), nn.Tanh(), norm(2), nn.Linear(5, 3))).double()
    folded = fold(model, (sample(),))
    assert folded.certificate["norms"]["after"] == {"batch_norm": 1}
    assert "progression" in {each["reason"] for each in folded.certificate["left"]}
    assert next(site["affine"] for site in folded.certificate["sites"]).startswith("0")


def test_a_progress_that_a_copy_of_the_checkpoint_has() -> None:
    state = nn.ModuleDict({"a": norm(5), "b": norm(0), "c": nn.ModuleDict({"d": norm(1)})}).state_dict()
    assert unfinished_steps(state) == {"a": 5, "c.d": 1}
    assert unfinished_steps(norm(7).state_dict()) == {"": 7}


@pytest.mark.parametrize("missing", ["total_step", "norm2.alpha", "iter"])
def test_a_layer_is_known_by_all_its_keys(missing: str) -> None:
    state = {f"a.{key}": value for key, value in norm(5).state_dict().items() if key != missing}
    assert unfinished_steps(state) == {}


def test_counters_of_other_layers_mean_nothing() -> None:
    state = {f"a.{key}": value for key, value in RepBN(5).state_dict().items()}
    assert unfinished_steps({**state, "a.iter": torch.tensor(5)}) == {}
    assert unfinished_steps({**norm(5).state_dict(), "iter": torch.ones(3)}) == {}
