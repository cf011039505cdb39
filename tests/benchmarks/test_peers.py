from __future__ import annotations

import subprocess
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch

from benchmarks.accuracy import percent
from benchmarks.peers.__main__ import Trial, theirs
from benchmarks.peers.calling import PEERS, REPOSITORY, Peer, PeerMissing, ask
from benchmarks.peers.environment import STAMP, python_of
from benchmarks.peers.order import ANSWER, LOGITS, Floats, Order
from normfuse.graph import Graph

SCALE = """
import numpy as np
from benchmarks.peers.order import Quantized, obey

def quantize(order, samples):
    print("libraries talk")
    assert order.setting == "doubled" and order.weight_bits == 4 and order.seed == 3
    return Quantized(lambda images: 2 * images.reshape(len(images), -1) + samples.mean(), "nothing")

obey("numpy", quantize)
"""


@pytest.fixture
def worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return tmp_path / "fake_peer.py"


def order(
    folder: Path, *, images: np.ndarray[tuple[int, ...], np.dtype[np.float32]], setting: str = "doubled"
) -> Order:
    np.savez(folder / "samples.npz", image=np.full((5, 1, 1, 3), 0.25, np.float32))
    np.savez(folder / "test.npz", image=images)
    (folder / "out").mkdir(exist_ok=True)
    return Order(
        model="m",
        archive="m.pt2",
        onnx="m.onnx",
        weight_bits=4,
        activation_bits=8,
        setting="doubled",
        samples=str(folder / "samples.npz"),
        test=str(folder / "test.npz"),
        output=str(folder / "out"),
        seed=3,
    )


def drawn(count: int) -> Floats:
    return np.random.default_rng(0).normal(size=(count, 1, 1, 3)).astype(np.float32)


def test_a_worker_answers_with_the_logits_of_every_image_in_order(tmp_path: Path, worker: Path) -> None:
    worker.write_text(SCALE)
    images = drawn(503)  # two whole parts and an odd one

    logits, answer = ask("fake", Peer(module="fake_peer"), order(tmp_path, images=images))

    np.testing.assert_array_equal(logits, 2 * images.reshape(503, 3) + np.float32(0.25))
    assert answer.version == np.__version__
    assert answer.tensors == "nothing"
    assert answer.seconds >= 0


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("raise SystemExit('cannot trace it')", "fake failed: cannot trace it"),
        ("raise ValueError('no such operator')", "fake failed: ValueError: no such operator"),
        ("", "fake left no answer"),
        ("import time; time.sleep(60)", "fake took more than 1 s"),
    ],
    ids=["exit", "exception", "silence", "too-long"],
)
def test_a_worker_that_fails_says_why(tmp_path: Path, worker: Path, source: str, told: str) -> None:
    worker.write_text(source)
    with pytest.raises(PeerMissing, match=told):
        ask("fake", Peer(module="fake_peer"), order(tmp_path, images=drawn(2)), limit=1 if "took" in told else 60)


def test_an_answer_that_is_no_answer_counts_as_none(tmp_path: Path, worker: Path) -> None:
    worker.write_text("")
    asked = order(tmp_path, images=drawn(2))
    np.save(tmp_path / "out" / LOGITS, drawn(2))
    (tmp_path / "out" / ANSWER).write_text('{"version": "1"}')
    with pytest.raises(PeerMissing, match="left no answer"):
        ask("fake", Peer(module="fake_peer"), asked)


def trial(folder: Path, images: torch.Tensor, labels: torch.Tensor) -> Trial:
    np.savez(folder / "samples0.npz", image=np.zeros((5, 1, 1, 3), np.float32))
    np.savez(folder / "test.npz", image=images.numpy())
    return Trial(
        model="m",
        graph=cast(Graph, None),  # peers get the files, not our graph
        folder=folder,
        seeds=1,
        samples=(images[:5],),
        images=images,
        labels=labels,
        wanted=1.5 * images.reshape(len(images), 3).numpy(),
        exact=90.0,
    )


def test_scores_are_made_here_and_lost_points_are_against_our_float_model(tmp_path: Path, worker: Path) -> None:
    worker.write_text(SCALE.replace(" and order.weight_bits == 4 and order.seed == 3", ""))
    images = torch.from_numpy(drawn(1000))
    labels = images.reshape(1000, 3).argmax(dim=1)
    labels[:137] = (labels[:137] + 1) % 3  # what doubles the images is wrong on exactly these

    row = theirs(trial(tmp_path, images, labels), "fake", Peer(module="fake_peer"), "8", "doubled")

    assert row.missing == ""
    assert list(row.lost) == pytest.approx([90.0 - 86.3])
    assert list(row.errors) == pytest.approx([1000 / 9])  # 2 x against 1.5 x
    assert row.cells()[:5] == ("fake, doubled", "8", "nothing", "3.70", "111")


@pytest.mark.parametrize("source", ["raise SystemExit('not today')", SCALE.replace("2 * images", "images[1:]")])
def test_a_peer_that_fails_leaves_a_row_that_says_so(tmp_path: Path, worker: Path, source: str) -> None:
    worker.write_text(source.replace(" and order.weight_bits == 4 and order.seed == 3", ""))
    images = torch.from_numpy(drawn(30))

    labels = torch.zeros(30, dtype=torch.int64)
    row = theirs(trial(tmp_path, images, labels), "fake", Peer(module="fake_peer"), "8", "doubled")

    assert row.lost == ()
    assert row.cells()[2].startswith("skipped: ")
    assert row.missing


def test_maps_of_labels_are_scored_by_mean_iou() -> None:
    labels = torch.tensor([[[0, 0], [1, 1]]])
    logits = np.zeros((1, 2, 2, 2), np.float32)
    logits[0, 1, :, 1] = 1  # the right column is class 1: of each class one pixel is right, of three in either
    assert percent([logits], labels) == pytest.approx(100 / 3)


def test_an_environment_is_kept_until_its_requirements_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted, calls = tmp_path / "peer.txt", list[tuple[str, ...]]()

    def call(command: tuple[str, ...], **_: object) -> subprocess.CompletedProcess[str]:
        calls.append(command)
        (tmp_path / "venvs" / "peer").mkdir(parents=True, exist_ok=True)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", call)
    wanted.write_text("torch==1\n")
    python = python_of("peer", wanted, folder=tmp_path / "venvs")
    assert [command[1:3] for command in calls] == [("-m", "venv"), ("-m", "pip")]
    assert calls[1][0] == str(python)
    assert calls[1][-2:] == ("-r", str(wanted))

    assert python_of("peer", wanted, folder=tmp_path / "venvs") == python
    assert len(calls) == 2
    wanted.write_text("torch==2\n")
    python_of("peer", wanted, folder=tmp_path / "venvs")
    assert len(calls) == 4


def test_what_cannot_be_installed_says_why_and_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = tmp_path / "peer.txt"
    wanted.write_text("no-such-thing==1\n")

    def fail(command: tuple[str, ...], **_: object) -> subprocess.CompletedProcess[str]:
        (tmp_path / "venvs" / "peer").mkdir(parents=True, exist_ok=True)
        is_pip = command[2] == "pip"
        return subprocess.CompletedProcess(command, int(is_pip), "", "a line\nERROR: no matching distribution\n\n")

    monkeypatch.setattr(subprocess, "run", fail)
    with pytest.raises(PeerMissing, match="peer cannot be installed: ERROR: no matching distribution"):
        python_of("peer", wanted, folder=tmp_path / "venvs")
    assert not (tmp_path / "venvs" / "peer" / STAMP).exists()


def test_every_peer_has_pins_and_a_worker() -> None:
    for peer in PEERS.values():
        assert peer.settings
        assert (REPOSITORY / f"{peer.module.replace('.', '/')}.py").is_file()
        if peer.requirements is not None:
            pins = [line for line in peer.requirements.read_text().splitlines() if line and not line.startswith("#")]
            assert "torch==2.13.0" in pins
            assert all("==" in pin for pin in pins)
