"""The zoo's data: seeded, disjoint between splits, balanced, and in range."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from examples.zoo import data, glyphs, scenes


def pictures(images: Tensor) -> set[bytes]:
    return {image.numpy().tobytes() for image in images}


@pytest.mark.parametrize(("task", "size", "classes"), [("glyphs", 48, 62), ("digits", 8, 10), ("glyph-scenes", 64, 9)])
@pytest.mark.parametrize("split", data.SPLITS)
def test_shapes_types_and_ranges(task: str, size: int, classes: int, split: str) -> None:
    images, labels = data.make(task, split, 70, 3)
    assert (images.shape, images.dtype) == ((70, 1, size, size), torch.float32)
    assert (labels.shape, labels.dtype) == ((70, size, size) if task == "glyph-scenes" else (70,), torch.int64)
    assert bool(images.isfinite().all())
    assert float(images.abs().max()) <= 4.0
    assert float(images.std()) > 0.3
    assert int(labels.min()) >= 0
    assert int(labels.max()) < classes


@pytest.mark.parametrize("task", data.TASKS)
def test_the_same_seed_gives_the_same_images(task: str) -> None:
    first, second, other = (
        data.make(task, "calib", 70, 0),
        data.make(task, "calib", 70, 0),
        data.make(task, "calib", 70, 1),
    )
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    assert not torch.equal(first[0], other[0])


@pytest.mark.parametrize("task", data.TASKS)
def test_fewer_are_the_first_of_more(task: str) -> None:
    few, more = data.make(task, "test", 10, 0), data.make(task, "test", 300, 0)
    assert torch.equal(few[0], more[0][:10])
    assert torch.equal(few[1], more[1][:10])


@pytest.mark.parametrize("task", list(data.RENDERERS))
def test_drawn_images_of_different_splits_seeds_and_chunks_differ(task: str) -> None:
    parts = [data.make(task, split, 300, seed)[0] for split in data.SPLITS for seed in (0, 1)]
    assert len(set().union(*map(pictures, parts))) == 300 * len(parts)


@pytest.mark.parametrize("task", list(data.RENDERERS))
def test_training_steps_never_draw_calibration_or_test_images(task: str) -> None:
    drawn = {glyphs.seed_of(task, "train", seed, f"step {step}") for seed in range(3) for step in range(10_000)}
    kept = {glyphs.seed_of(task, split, seed, 256 * n) for split in data.SPLITS for seed in range(9) for n in range(99)}
    assert not drawn & kept
    assert len(kept) == 3 * 9 * 99


def test_scenes_show_every_class_and_mostly_ground() -> None:
    _, labels = data.make("glyph-scenes", "calib", 200, 0)
    shares = torch.bincount(labels.flatten(), minlength=9) / labels.numel()
    assert 0.6 < float(shares[scenes.BACKGROUND]) < 0.85
    assert float(shares[1:].min()) > 0.02
    shown = [len(set(scene.unique().tolist()) - {scenes.BACKGROUND}) for scene in labels]
    assert min(shown) >= 1
    assert max(shown) == scenes.MOST


def test_characters_of_a_scene_lie_where_their_label_says() -> None:
    images, labels = scenes.render(64, 5)
    for image, label in zip(images[:, 0], labels, strict=True):
        ground = image[label == scenes.BACKGROUND]
        middle, spread = ground.mean(), ground.std()
        # Ink is at least 0.35 away from a level of which noise and texture are a small part.
        inside = (image[label != scenes.BACKGROUND] - middle).abs().mean()
        assert inside > 1.2 * spread


def test_later_characters_cover_earlier_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    ink, order = torch.zeros(50, 1, scenes.SIZE, scenes.SIZE), iter(range(scenes.MOST))
    ink[:, :, 10:20, 30:37] = 1.0
    monkeypatch.setattr(scenes, "_characters", lambda dice: (torch.full((50,), next(order)), ink))
    _, labels = scenes.render(50, 5)
    inside = labels[:, 10:20, 30:37].flatten(1)
    assert bool((inside == inside[:, :1]).all())
    assert set(inside.unique().tolist()) == set(range(scenes.LEAST, scenes.MOST + 1))  # class n is the nth drawn
    assert int(labels.count_nonzero()) == 50 * 70


def test_digits_are_cut_once() -> None:
    counts = {"train": 1078, "calib": 359, "test": 360}
    for seed in (0, 5):
        parts = {split: data.make("digits", split, count, seed)[0] for split, count in counts.items()}
        assert len(set().union(*map(pictures, parts.values()))) == 1797
    assert pictures(parts["test"]) == pictures(data.make("digits", "test", 360, 0)[0])


@pytest.mark.parametrize(("task", "count", "classes"), [("glyphs", 6200, 62), ("digits", 1078, 10)])
def test_labels_are_balanced(task: str, count: int, classes: int) -> None:
    _, labels = data.make(task, "train", count, 0)
    expected = count / classes
    # A count of independent draws spreads by about its root; five times that is one false alarm in a million.
    assert float((torch.bincount(labels, minlength=classes) - expected).abs().max()) < 5 * expected**0.5


def test_every_font_holds_every_character() -> None:
    atlas = glyphs.atlas()
    assert atlas.shape == (len(glyphs.FONTS), 62, 64, 64)
    assert float(atlas.sum(dim=(2, 3)).min()) > 50  # no blank: even an "i" is some fifty pixels of ink
    border = torch.ones(64, 64, dtype=torch.bool)
    border[1:-1, 1:-1] = False
    assert float(atlas[:, :, border].max()) == 0  # nothing is cut off
    for font in atlas:  # a missing character would be drawn as the same box as every other one
        assert len(pictures(font)) == 62


def test_character_and_label_belong_together() -> None:
    # The nearest glyph of the atlas, by correlation and without any undoing of the distortions, must be the right
    # one far more often than the one time in 62 of a shuffled pairing.
    images, labels = data.make("glyphs", "test", 256, 0)
    templates = torch.nn.functional.interpolate(glyphs.atlas().flatten(0, 1)[:, None], size=48, mode="area").flatten(1)
    templates = torch.nn.functional.normalize(templates - templates.mean(dim=1, keepdim=True))
    found = (images.flatten(1) @ templates.mT).abs().argmax(dim=1) % 62
    assert float((found == labels).float().mean()) > 0.15


@pytest.mark.parametrize(
    ("task", "split", "count"), [("digits", "test", 361), ("digits", "train", 2000), ("glyphs", "x", 1)]
)
def test_what_does_not_exist_is_refused(task: str, split: str, count: int) -> None:
    with pytest.raises(ValueError, match=f"{split}"):
        data.make(task, split, count, 0)


def test_the_command_writes_an_archive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "deep" / "calib.npz"
    arguments = ["glyphs", "--split", "calib", "--count", "5", "--seed", "7", "-o", str(path)]
    monkeypatch.setattr(sys, "argv", ["data", *arguments])
    data.main()
    assert "5 images" in capsys.readouterr().out
    images, labels = data.make("glyphs", "calib", 5, 7)
    with np.load(path) as written:
        assert sorted(written) == ["image", "label"]
        assert (written["image"].dtype, written["label"].dtype) == (np.float32, np.int64)
        np.testing.assert_array_equal(written["image"], images.numpy())
        np.testing.assert_array_equal(written["label"], labels.numpy())


def test_the_command_refuses_with_a_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["digits", "--split", "test", "--count", "9999", "-o", str(tmp_path / "x.npz")]
    monkeypatch.setattr(sys, "argv", ["data", *arguments])
    with pytest.raises(SystemExit) as caught:
        data.main()
    assert caught.value.code == 2
    assert "360 test images, not 9999" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
