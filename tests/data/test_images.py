"""Folders of images: order, classes, the arithmetic of preprocessing, bad files."""

import builtins
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from normfuse.data import Preprocess, load_samples
from normfuse.data.preprocess import Interpolation
from normfuse.data.samples import Array
from normfuse.errors import BadInput, MissingDependency, UsageError

GRAY = Preprocess.parse("mean=0.25;std=0.5;size=8")
COLOR = Preprocess.parse("mean=0.1,0.2,0.3;std=0.5,0.6,0.7;size=5x9")


def paint(path: Path, *, size: tuple[int, int] = (8, 8), color: tuple[int, int, int] = (10, 20, 30)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path)


def only(folder: Path, preprocess: Preprocess) -> Array:
    (batch,) = list(load_samples(folder, preprocess=preprocess))
    image: Array = batch.inputs["image"][0]
    return image


def test_classes_are_numbered_in_sorted_order(tmp_path: Path) -> None:
    for name, count in (("dog", 2), ("ant", 1), ("cat", 3)):
        for index in range(count):
            paint(tmp_path / name / f"{index}.png")
    (tmp_path / "bee").mkdir()  # a class without images here keeps its number
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "ant" / "notes.txt").write_text("not an image")
    paint(tmp_path / "ant" / "._0.png")
    samples = load_samples(tmp_path, preprocess=GRAY)
    assert samples.classes == ("ant", "bee", "cat", "dog")
    assert samples.labels is not None
    assert samples.labels.tolist() == [0, 2, 2, 2, 3, 3]
    assert len(samples) == 6


def test_without_classes_there_are_no_labels(tmp_path: Path) -> None:
    paint(tmp_path / "b.jpg")
    paint(tmp_path / "a.PNG", color=(255, 255, 255))
    samples = load_samples(tmp_path, preprocess=GRAY)
    assert samples.labels is None
    batch = next(samples.batches(2))
    assert batch.inputs["image"].shape == (2, 1, 8, 8)
    assert batch.inputs["image"][0].min() == np.float32((1 - 0.25) / 0.5)


def test_color_arithmetic(tmp_path: Path) -> None:
    paint(tmp_path / "a.png", size=(31, 17), color=(51, 102, 255))
    image = only(tmp_path, COLOR)
    assert image.shape == (3, 5, 9)
    assert image.dtype == np.float32
    expected = (np.array([51, 102, 255]) / 255 - np.array(COLOR.mean)) / np.array(COLOR.std)
    # Three float32 operations on values below 2.
    assert np.abs(image - expected[:, None, None]).max() < 4 * 2 * np.finfo(np.float32).eps


def test_the_centre_is_kept_and_the_shorter_side_resized(tmp_path: Path) -> None:
    # 40x20 -> 20x10 (shorter side 10) -> the middle 6x6: columns 7..12 of the small image, 14..25 of the large.
    image = Image.new("L", (40, 20), 0)
    image.paste(255, (14, 0, 26, 20))
    image.save(tmp_path / "a.png")
    preprocess = Preprocess.parse("mean=0;std=1;size=6;resize=10;interpolation=nearest")
    assert preprocess.interpolation is Interpolation.NEAREST
    assert only(tmp_path, preprocess).tolist() == np.ones((1, 6, 6)).tolist()


@pytest.mark.parametrize("size", [(1, 1), (3, 200), (200, 3), (7, 5), (129, 63)])
def test_every_size_covers_the_crop(tmp_path: Path, size: tuple[int, int]) -> None:
    paint(tmp_path / "a.png", size=size, color=(255, 255, 255))
    image = only(tmp_path, COLOR)
    assert image.shape == (3, 5, 9)
    assert np.ptp(image, axis=(1, 2)).max() == 0  # no border of another color


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK"])
def test_modes(tmp_path: Path, mode: str) -> None:
    suffix = "tif" if mode == "CMYK" else "png"
    Image.new("RGB", (9, 9), (255, 255, 255)).convert(mode).save(tmp_path / f"a.{suffix}")
    assert only(tmp_path, Preprocess.parse("mean=0,0,0;std=1,1,1;size=4")).tolist() == np.ones((3, 4, 4)).tolist()


def test_sixteen_bits_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.full((9, 9), 40000, dtype=np.uint16)).save(tmp_path / "a.png")
    with pytest.raises(BadInput, match="pixels of type I;16"):
        only(tmp_path, GRAY)


def test_bad_images(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("no image")
    with pytest.raises(BadInput, match="cannot be read") as caught:
        only(tmp_path, GRAY)
    assert "a.png" in caught.value.where
    noise = np.random.default_rng(2).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.png")
    (tmp_path / "a.png").write_bytes((tmp_path / "a.png").read_bytes()[:3000])
    with pytest.raises(BadInput, match="cannot be read"):
        only(tmp_path, GRAY)


def test_suspiciously_large_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paint(tmp_path / "a.png", size=(12, 12))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(BadInput, match="cannot be read"):
        only(tmp_path, GRAY)


def test_images_beside_classes(tmp_path: Path) -> None:
    paint(tmp_path / "a.png")
    paint(tmp_path / "ant" / "a.png")
    with pytest.raises(BadInput, match="beside sub-folders"):
        load_samples(tmp_path, preprocess=GRAY)


def test_preprocess_is_needed(tmp_path: Path) -> None:
    paint(tmp_path / "a.png")
    with pytest.raises(UsageError, match="trained with") as caught:
        load_samples(tmp_path)
    assert "imagenet" in caught.value.hint


def test_pillow_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paint(tmp_path / "a.png")
    real = builtins.__import__

    def without_pillow(name: str, *rest: Any, **options: Any) -> Any:
        if name.startswith("PIL"):
            raise ImportError(name)
        return real(name, *rest, **options)

    monkeypatch.setattr(builtins, "__import__", without_pillow)
    with pytest.raises(MissingDependency, match="Pillow"):
        load_samples(tmp_path, preprocess=GRAY)


def test_presets() -> None:
    imagenet, vit = Preprocess.parse("imagenet"), Preprocess.parse(" vit ; size=384 ")
    assert (imagenet.size, imagenet.resize) == ((224, 224), 256)
    assert imagenet.mean == (0.485, 0.456, 0.406)
    assert (vit.size, vit.interpolation) == ((384, 384), Interpolation.BICUBIC)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not known"),
        ("imagnet", "'imagnet' is not known"),
        ("mean=0;std=1", "size is missing"),
        ("mean=0;std=1;size=4;crop=3", "crop=3"),
        ("mean=a;std=1;size=4", "could not convert"),
        ("mean=0,0;std=1,1;size=4", "one value each"),
        ("mean=0,0,0;std=1;size=4", "one value each"),
        ("mean=0;std=0;size=4", "std must be positive"),
        ("mean=0;std=1;size=0", "sizes must be positive"),
        ("mean=0;std=1;size=4;resize=0", "sizes must be positive"),
        ("mean=0;std=1;size=4;interpolation=best", "best"),
    ],
)
def test_bad_preprocess(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        Preprocess.parse(text)
    assert "imagenet" in caught.value.expected
