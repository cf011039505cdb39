"""A calibration that was killed goes on where it was, and ends with what it would have ended with."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normfuse.planning
from normfuse.build import FOLDING
from normfuse.checkpoint import Checkpoint, calibration_key, remove_checkpoint
from normfuse.export.placement import X86_VNNI
from normfuse.graph import Graph, capture
from normfuse.planning import Plan, plan_quantization
from normfuse.precision import blockwise
from normfuse.progress import Silent
from normfuse.recipe import Recipe
from normfuse.testing import seeded

BLOCKS = 4
LEARNED = Recipe(bits="w3a4", effort=2)


class Killed(BaseException):
    """What stops a run between two blocks."""


def folded(seed: int = 0) -> Graph:
    torch.manual_seed(seed)
    layers = [nn.Linear(9, 24), nn.GELU(), nn.Linear(24, 24), nn.GELU(), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 5)]
    graph = capture(nn.Sequential(*layers).eval(), [torch.randn(2, 9)])
    FOLDING.run(graph)
    return graph


def samples(seed: int = 1) -> Callable[[], Iterator[Sequence[Tensor]]]:
    x = torch.randn(48, 9, generator=seeded(seed))
    return lambda: ([each[None]] for each in x)


def quantized(resume: Path | None, *, recipe: Recipe | None = None, model: int = 0, data: int = 1) -> Plan:
    return plan_quantization(
        folded(model),
        samples(data),
        recipe=recipe or Recipe(bits="w3a4"),
        placement=X86_VNNI,
        total=48,
        progress=Silent(),
        resume=resume,
    )


@pytest.fixture
def refined(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The blocks that were refined, in order."""
    found = list[str]()
    real = blockwise._refine

    def watched(block: Any, *rest: Any) -> Any:
        found.append(block.segment.exits[0].name)
        return real(block, *rest)

    monkeypatch.setattr(blockwise, "_refine", watched)
    return found


def kill_after(blocks: int, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Leave in the folder what a run leaves that is killed after some blocks."""
    real = Checkpoint.keep_block

    def keep(self: Checkpoint, index: int, *rest: Any) -> None:
        real(self, index, *rest)
        if index + 1 == blocks:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "keep_block", keep)
        with pytest.raises(Killed):
            quantized(folder)


def constants(found: Plan) -> dict[str, Tensor]:
    return dict(found.simulated()[0].module.named_buffers())


def are_the_same(one: Plan, other: Plan) -> bool:
    first, second = constants(one), constants(other)
    same = first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    return (
        same
        and one.simulated()[0].text() == other.simulated()[0].text()
        and one.blocks == other.blocks
        and one.ranges == other.ranges
    )


@pytest.mark.parametrize("blocks", [1, BLOCKS - 1])
def test_only_what_is_left_is_computed_and_the_result_is_the_same(
    blocks: int, monkeypatch: pytest.MonkeyPatch, refined: list[str], tmp_path: Path
) -> None:
    plain = quantized(None)
    assert len(refined) == BLOCKS
    kill_after(blocks, monkeypatch, tmp_path / "work")
    observed = list[object]()
    monkeypatch.setattr(normfuse.planning, "calibrate", lambda *given, **_: observed.append(given))
    refined.clear()
    resumed = quantized(tmp_path / "work")
    assert len(refined) == BLOCKS - blocks
    assert not observed
    assert are_the_same(resumed, plain)
    assert resumed.notes == ()


@pytest.mark.parametrize(
    ("other", "named"),
    [
        pytest.param({"recipe": Recipe(bits="w3a8")}, "recipe", id="bits"),
        pytest.param({"recipe": Recipe(bits="w3a4", seed=1)}, "recipe", id="seed"),
        pytest.param({"model": 5}, "model", id="weights"),
        pytest.param({"data": 2}, "samples", id="samples"),
    ],
)
def test_what_belongs_to_something_else_is_not_used(
    other: dict[str, Any], named: str, monkeypatch: pytest.MonkeyPatch, refined: list[str], tmp_path: Path
) -> None:
    kill_after(2, monkeypatch, tmp_path / "work")
    refined.clear()
    found = quantized(tmp_path / "work", **other)
    assert len(refined) == BLOCKS
    assert len(found.notes) == 1
    assert f"another {named}:" in found.notes[0]
    assert are_the_same(found, quantized(None, **other))


def cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


def flipped(data: bytes) -> bytes:
    return data[:-40] + bytes([data[-40] ^ 1]) + data[-39:]


@pytest.mark.parametrize("damage", [cut, flipped, lambda data: b""])
@pytest.mark.parametrize("name", ["ranges.npz", "block-0000.npz", "block-0000.sha256", "key.json"])
def test_a_damaged_part_is_computed_again(
    name: str,
    damage: Callable[[bytes], bytes],
    monkeypatch: pytest.MonkeyPatch,
    refined: list[str],
    tmp_path: Path,
) -> None:
    plain = quantized(None)
    kill_after(2, monkeypatch, tmp_path)
    part = tmp_path / name
    part.write_bytes(damage(part.read_bytes()))
    refined.clear()
    found = quantized(tmp_path)
    expected = {"ranges.npz": BLOCKS - 2, "key.json": BLOCKS}
    assert len(refined) == expected.get(name, BLOCKS - 1)
    assert len(found.notes) == 1
    assert are_the_same(found, plain)


def test_a_part_that_is_half_there_is_computed_again(
    monkeypatch: pytest.MonkeyPatch, refined: list[str], tmp_path: Path
) -> None:
    kill_after(2, monkeypatch, tmp_path)
    (tmp_path / "block-0001.sha256").unlink()  # it is written last
    refined.clear()
    quantized(tmp_path)
    assert len(refined) == BLOCKS - 1


def test_parts_swapped_are_not_used(monkeypatch: pytest.MonkeyPatch, refined: list[str], tmp_path: Path) -> None:
    plain = quantized(None)
    kill_after(2, monkeypatch, tmp_path)
    for end in ("npz", "sha256"):
        (tmp_path / f"block-0000.{end}").replace(tmp_path / f"block-0001.{end}")
    refined.clear()
    found = quantized(tmp_path)
    assert len(refined) == BLOCKS
    assert are_the_same(found, plain)


def test_removing_leaves_what_others_put_there(tmp_path: Path) -> None:
    folder = tmp_path / "work"
    quantized(folder)
    (folder / "mine.txt").write_text("mine")
    remove_checkpoint(folder)
    assert [path.name for path in folder.iterdir()] == ["mine.txt"]
    (folder / "block-0000.npz").write_text("no key beside it: somebody's own")
    remove_checkpoint(folder)
    assert len(list(folder.iterdir())) == 2
    quantized(tmp_path / "other")
    remove_checkpoint(tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_the_key_changes_with_one_weight_and_one_sample() -> None:
    keys = [calibration_key(folded(), samples(), {"bits": 8})]
    graph = folded()
    with torch.no_grad():
        next(iter(graph.module.buffers())).view(-1)[3] += 1e-6
    keys.append(calibration_key(graph, samples(), {"bits": 8}))
    keys.append(calibration_key(folded(), lambda: (s for i, s in enumerate(samples()()) if i != 7), {"bits": 8}))
    keys.append(calibration_key(folded(), samples(), {"bits": 6}))
    assert [sum(keys[0][name] != key[name] for name in key) for key in keys] == [0, 1, 1, 1]
    assert keys[0] == calibration_key(folded(), samples(), {"bits": 8})


@pytest.mark.slow
def test_a_process_killed_outright_leaves_parts_to_go_on_from(tmp_path: Path, refined: list[str]) -> None:
    here = Path(__file__)
    program = f"""
        import importlib.machinery, os, signal, sys
        sys.meta_path.insert(0, importlib.machinery.PathFinder)  # this checkout, wherever an installed one lies
        sys.path.insert(0, {str(here.parent)!r})
        sys.path.insert(0, {str(Path(normfuse.__file__).parents[1])!r})
        import torch
        torch.set_num_threads({torch.get_num_threads()})
        from pathlib import Path
        import {here.stem} as own
        from normfuse.checkpoint import Checkpoint
        real = Checkpoint.keep_block
        def keep(self, index, *rest):
            real(self, index, *rest)
            if index == 1:
                os.kill(os.getpid(), signal.SIGKILL)
        Checkpoint.keep_block = keep
        own.quantized(Path({str(tmp_path)!r}), recipe=own.LEARNED)
    """
    ended = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=False, capture_output=True)
    assert ended.returncode == -9, ended.stderr.decode()
    found = quantized(tmp_path, recipe=LEARNED)
    assert len(refined) == BLOCKS - 2 + 1  # and the network as a whole
    assert are_the_same(found, quantized(None, recipe=LEARNED))
