"""A score that was interrupted goes on to the same numbers; what does not belong to it is not used."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from small_subject import made, subject_of
from torch import nn

from normfuse.checkpoint import Checkpoint
from normfuse.graph.segments import segments
from normfuse.progress import Silent
from normfuse.quant.score_method import ScoreMethod
from normfuse.sensitivity.curvature import curvature
from normfuse.sensitivity.keeping import FORGETFUL, Keeper, steps
from normfuse.sensitivity.methods import scores_of
from normfuse.sensitivity.one_at_a_time import one_at_a_time
from normfuse.sensitivity.output_loss import OutputLoss
from normfuse.sensitivity.sensitivity import Kind, Sensitivity, Tally
from normfuse.sensitivity.subject import Subject
from normfuse.testing import seeded

X = torch.randn(5, 9, generator=seeded(0))
PARTS = made(a=nn.Linear(9, 7), b=nn.Linear(7, 11), c=nn.Linear(11, 3))
KEY = {"model": "of this test", "samples": "5"}


@cache
def subject() -> Subject:
    """Three segments and three chunks."""
    found = subject_of(lambda m, x: m.c(m.b(m.a(x).relu()).tanh()), X, sizes=(2, 1, 2), parts=PARTS)
    maps = set(found.maps)
    assert len(segments(found.graph, wanted=lambda node: node in maps)) == 3
    return found


class Interrupted(Exception):
    """The process was killed."""


class Failing:
    """Keeps so many steps, and is interrupted as it keeps the next."""

    def __init__(self, kept: Keeper, steps: int) -> None:
        self.kept, self.steps = kept, steps

    def get(self, part: str) -> Any | None:
        return self.kept.get(part)

    def put(self, part: str, state: Any) -> None:
        if self.steps == 0:
            raise Interrupted
        self.steps -= 1
        self.kept.put(part, state)


class Watched(Failing):
    """Keeps everything and tells of it."""

    def __init__(self, kept: Keeper) -> None:
        super().__init__(kept, -1)
        self.put_parts = list[str]()

    def put(self, part: str, state: Any) -> None:
        self.put_parts.append(part)
        super().put(part, state)


def measured(keeper: Keeper) -> list[Sensitivity]:
    return one_at_a_time(subject(), list(OutputLoss), progress=Silent(), keeper=keeper)


def followed(keeper: Keeper) -> list[Sensitivity]:
    return [curvature(subject(), OutputLoss.DIVERGENCE, seed=3, progress=Silent(), keeper=keeper)]


SCORES: dict[Callable[[Keeper], list[Sensitivity]], str] = {
    measured: "kl+sqnr-segments",
    followed: "curvature-chunks",
}


@pytest.mark.parametrize("done", [0, 1, 2])
@pytest.mark.parametrize("score", SCORES)
def test_an_interrupted_run_resumes_to_identical_numbers(
    score: Callable[[Keeper], list[Sensitivity]], done: int, tmp_path: Path
) -> None:
    expected, kept = score(FORGETFUL), Checkpoint(tmp_path, KEY)
    with pytest.raises(Interrupted):
        score(Failing(kept, done))
    resumed = Watched(kept)
    assert score(resumed) == expected
    assert resumed.put_parts == [SCORES[score]] * (3 - done), "what is done is not done again"
    state = kept.get(SCORES[score])
    assert state is not None
    assert state["done"] == 3


@pytest.mark.parametrize("score", SCORES)
def test_what_is_finished_is_not_computed_again(
    score: Callable[[Keeper], list[Sensitivity]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, kept = score(Checkpoint(tmp_path, KEY)), Watched(Checkpoint(tmp_path, KEY))

    def never(*_: object, **__: object) -> None:
        raise AssertionError("a part is computed again")

    monkeypatch.setattr(OutputLoss, "per_sample", never)
    monkeypatch.setattr(OutputLoss, "probe", never)
    assert score(kept) == expected
    assert kept.put_parts == []


@pytest.mark.parametrize("score", SCORES)
def test_another_key_starts_anew(score: Callable[[Keeper], list[Sensitivity]], tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        score(Failing(Checkpoint(tmp_path, KEY), 2))
    other = Watched(Checkpoint(tmp_path, {**KEY, "samples": "6"}))
    assert score(other) == score(FORGETFUL)
    assert len(other.put_parts) == 3


def cut_off(data: bytes) -> bytes:
    return data[: len(data) // 2]


def changed(data: bytes) -> bytes:
    """It says that one step more is done."""
    found = data.replace(b'"done": 1', b'"done": 3')
    assert found != data
    return found


@pytest.mark.parametrize("damage", [cut_off, changed, lambda _: b""])
@pytest.mark.parametrize("score", SCORES)
def test_a_damaged_file_is_ignored(
    score: Callable[[Keeper], list[Sensitivity]], damage: Callable[[bytes], bytes], tmp_path: Path
) -> None:
    with pytest.raises(Interrupted):
        score(Failing(Checkpoint(tmp_path, KEY), 1))
    (path,) = tmp_path.glob("*.npz")
    path.write_bytes(damage(path.read_bytes()))
    resumed = Watched(Checkpoint(tmp_path, KEY))
    assert score(resumed) == score(FORGETFUL)
    assert len(resumed.put_parts) == 3


STATES = [
    {"done": 2, "tallies": [{"weight": {"a": {"2": 0.1 + 0.2}}}]},
    [1, 2.5, "three", None, True],
    {"least": 5e-324, "most": 1.7976931348623157e308},
]


@pytest.mark.parametrize("state", STATES)
def test_plain_data_comes_back(state: Any, tmp_path: Path) -> None:
    kept = Checkpoint(tmp_path, KEY)
    assert kept.get("part") is None
    kept.put("part", "what was before")
    kept.put("part", state)
    assert Checkpoint(tmp_path, KEY).get("part") == state
    assert kept.get("another") is None


def test_nothing_is_kept_by_default() -> None:
    FORGETFUL.put("part", 1)
    assert FORGETFUL.get("part") is None


def total(tally: Tally) -> dict[str, dict[int, float]]:
    return tally.of(Kind.WEIGHT)


def test_steps_restore_and_keep(tmp_path: Path) -> None:
    """Two tallies of four steps, cut off behind the second."""
    kept = Checkpoint(tmp_path, KEY)

    def run(keeper: Keeper) -> tuple[list[bool], list[Mapping[str, Mapping[int, float]]]]:
        tallies, done = [Tally(), Tally()], list[bool]()
        for at, is_done in steps(keeper, "part", tallies, 4):
            done.append(is_done)
            for number, tally in enumerate(tallies, start=1):
                if not is_done:
                    tally.add(Kind.WEIGHT, "a", 4, number * 10.0**at)
        return done, [total(tally) for tally in tallies]

    with pytest.raises(Interrupted):
        run(Failing(kept, 2))
    assert run(kept) == ([True, True, False, False], [{"a": {4: 1111.0}}, {"a": {4: 2222.0}}])
    assert run(kept) == ([True] * 4, [{"a": {4: 1111.0}}, {"a": {4: 2222.0}}])


def test_steps_of_other_tallies_start_anew(tmp_path: Path) -> None:
    kept = Checkpoint(tmp_path, KEY)
    assert [is_done for _, is_done in steps(kept, "part", [Tally()], 2)] == [False, False]
    assert [is_done for _, is_done in steps(kept, "part", [Tally(), Tally()], 2)] == [False, False]


METHODS = [ScoreMethod.FISHER, ScoreMethod.DIVERGENCE, ScoreMethod.CURVATURE, ScoreMethod.NOISE]


@pytest.mark.parametrize("done", range(10))
def test_several_scores_resume(done: int, tmp_path: Path) -> None:
    """Interrupted anywhere: in the three segments, the three chunks, and between them and the four results."""
    expected, kept = scores_of(subject(), METHODS), Checkpoint(tmp_path, KEY)
    with pytest.raises(Interrupted):
        scores_of(subject(), METHODS, keeper=Failing(kept, done))
    resumed = Watched(kept)
    assert scores_of(subject(), METHODS, keeper=resumed) == expected
    assert len(resumed.put_parts) == 10 - done


def test_scores_that_are_kept_are_not_computed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = Checkpoint(tmp_path, KEY)
    expected = scores_of(subject(), METHODS, keeper=kept)

    def never(*_: object, **__: object) -> None:
        raise AssertionError("a score is computed again")

    for name in ("one_at_a_time", "score"):
        monkeypatch.setattr(f"normfuse.sensitivity.methods.{name}", never)
    assert scores_of(subject(), METHODS[::-1], keeper=kept) == expected[::-1]


def test_one_of_the_two_measured_scores_may_be_known(tmp_path: Path) -> None:
    kept = Checkpoint(tmp_path, KEY)
    (known,) = scores_of(subject(), [ScoreMethod.NOISE], keeper=kept)
    both = scores_of(subject(), [ScoreMethod.DIVERGENCE, ScoreMethod.NOISE], keeper=kept)
    assert both == scores_of(subject(), [ScoreMethod.DIVERGENCE, ScoreMethod.NOISE])
    assert both[1] == known
