"""A compile of mixed bits that was interrupted goes on where it was, and ends with what it would have ended with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from mixed_network import bits_of, compiled

from normfuse import mixing, quantizing
from normfuse.built import Built
from normfuse.checkpoint import Checkpoint
from normfuse.precision import blockwise
from normfuse.runtime.instruction_set import InstructionSet, detect_instruction_set
from normfuse.sensitivity import methods

REFINED: dict[str, Any] = {"effort": 1, "score": "default"}


class Killed(BaseException):
    """What stops a run."""


class Work:
    """What takes long, counted: scores that are computed, and blocks that are refined."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.scores, self.blocks = list[str](), list[str]()
        for name in ("curvature", "one_at_a_time"):
            monkeypatch.setattr(methods, name, self._scored(name, getattr(methods, name)))
        real = blockwise._refine

        def refined(block: Any, *rest: Any) -> Any:
            self.blocks.append(block.segment.exits[0].name)
            return real(block, *rest)

        monkeypatch.setattr(blockwise, "_refine", refined)

    def _scored(self, name: str, real: Any) -> Any:
        def score(*given: Any, **options: Any) -> Any:
            self.scores.append(name)
            return real(*given, **options)

        return score

    def again(self) -> None:
        """Count from here."""
        self.scores.clear()
        self.blocks.clear()


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> Work:
    return Work(monkeypatch)


def kill_behind_scores(folder: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
    """Leave what a run leaves that is killed when all scores are known."""

    def killed(*given: Any, **rest: Any) -> Any:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(mixing, "choose", killed)
        with pytest.raises(Killed):
            compiled(resume=folder, **options)


def kill_behind_a_block(folder: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
    """Leave what a run leaves that is killed when one block of one candidate is finished."""
    real = Checkpoint.keep_block

    def keep(self: Checkpoint, index: int, *rest: Any) -> None:
        real(self, index, *rest)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "keep_block", keep)
        with pytest.raises(Killed):
            compiled(resume=folder, **options)


def are_the_same(one: Built, other: Built) -> bool:
    same = all(one.report[name] == other.report[name] for name in ("mixed", "quantization", "pareto", "checks"))
    return same and one.engine.path.read_bytes() == other.engine.path.read_bytes()


@pytest.mark.slow
def test_scores_are_not_computed_again_and_the_result_is_the_same(
    work: Work, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    plain = compiled(budget="avg-bits=6", **REFINED)
    assert work.scores == ["one_at_a_time", "curvature"]
    blocks = list(work.blocks)
    kill_behind_scores(tmp_path / "work", monkeypatch, budget="avg-bits=6", **REFINED)
    work.again()
    resumed = compiled(budget="avg-bits=6", resume=tmp_path / "work", **REFINED)
    assert (work.scores, work.blocks) == ([], blocks)
    assert are_the_same(resumed, plain)
    assert resumed.report["warnings"] == plain.report["warnings"]


@pytest.mark.slow
def test_finished_blocks_of_a_candidate_are_not_refined_again(
    work: Work, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    plain = compiled(budget="avg-bits=6", **REFINED)
    blocks = list(work.blocks)
    assert len(blocks) > 1
    kill_behind_a_block(tmp_path / "work", monkeypatch, budget="avg-bits=6", **REFINED)
    work.again()
    resumed = compiled(budget="avg-bits=6", resume=tmp_path / "work", **REFINED)
    assert (work.scores, work.blocks) == ([], blocks[1:])
    assert are_the_same(resumed, plain)


@pytest.mark.slow
def test_another_budget_goes_on_from_the_same_scores(
    work: Work, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    kill_behind_scores(tmp_path / "work", monkeypatch, budget="avg-bits=6", **REFINED)
    work.again()
    resumed = compiled(pareto=True, point=2, resume=tmp_path / "work", **REFINED)
    assert work.scores == []
    assert are_the_same(resumed, compiled(pareto=True, point=2, **REFINED))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("other", "named"),
    [
        ({"data": 5}, "samples"),
        ({"weight_widths": "2,4,8"}, "recipe"),
        ({"overrides": "head=8"}, "recipe"),
    ],
    ids=["samples", "widths", "overrides"],
)
def test_scores_of_something_else_are_not_used(
    other: dict[str, Any], named: str, work: Work, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    kill_behind_scores(tmp_path / "work", monkeypatch, budget="avg-bits=7", score="curvature")
    work.again()
    found = compiled(resume=tmp_path / "work", **{"budget": "avg-bits=7", "score": "curvature", **other})
    assert work.scores == ["curvature"]
    assert any(f"another {named}:" in said for said in found.report["warnings"])


@pytest.mark.slow
def test_scores_for_another_processor_are_not_used(work: Work, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    options = {"budget": "avg-bits=7", "score": "curvature"}
    kill_behind_scores(tmp_path / "work", monkeypatch, **options)
    work.again()
    here = detect_instruction_set()
    there = InstructionSet.AVX2 if here is not InstructionSet.AVX2 else InstructionSet.AVX512_VNNI
    monkeypatch.setattr(quantizing, "detect_instruction_set", lambda: there)
    kill_behind_scores(tmp_path / "work", monkeypatch, **options)
    assert work.scores == ["curvature"]


@pytest.mark.slow
def test_a_damaged_score_is_computed_again(work: Work, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    kill_behind_scores(tmp_path / "work", monkeypatch, budget="avg-bits=6", **REFINED)
    (kept,) = (tmp_path / "work").glob("score-kl.npz")
    data = kept.read_bytes()
    kept.write_bytes(data[:-40] + bytes([data[-40] ^ 1]) + data[-39:])
    work.again()
    resumed = compiled(budget="avg-bits=6", resume=tmp_path / "work", **REFINED)
    assert work.scores == ["one_at_a_time"]
    assert any("score-kl.npz is not what was written" in said for said in resumed.report["warnings"])
    assert bits_of(resumed) == bits_of(compiled(budget="avg-bits=6", **REFINED))


@pytest.mark.slow
def test_saving_removes_the_folder(tmp_path: Path) -> None:
    built = compiled(pareto=True, resume=tmp_path / "out.resume", effort=1)
    kept = {path.name for path in (tmp_path / "out.resume").iterdir()}
    assert {"key.json", "score-random.npz"} <= kept
    assert len([name for name in kept if name.startswith("bits-")]) == len(built.report["pareto"]["points"])
    built.save(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
