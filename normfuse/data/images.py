"""Samples from a folder of images, one image in memory at a time; sub-folders are classes."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np

from normfuse.data.preprocess import Preprocess
from normfuse.data.samples import Array, Sample, Samples
from normfuse.errors import BadInput, MissingDependency

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["holds_images", "read"]

SUFFIXES: Final = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"})
EIGHT_BITS: Final = frozenset({"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "LAB"})


def holds_images(folder: Path) -> bool:
    """Whether there is an image in the folder or in one of its sub-folders."""
    return any(_images(part) for part in (folder, *_folders(folder)))


def read(folder: Path, preprocess: Preprocess) -> Samples:
    """Return the images of ``folder``, in the order of their names, class by class.

    An empty sub-folder keeps its number, so that labels do not move when a class has no images here.

    Raises:
        BadInput: images stand both beside and in sub-folders; or, when read, a file is no image.
        MissingDependency: Pillow is not installed.
    """
    _pillow(folder)
    beside, classes = _images(folder), _folders(folder)
    if not beside:
        found = [(file, label) for label, part in enumerate(classes) for file in _images(part)]
        files, labels = [file for file, _ in found], np.array([label for _, label in found], dtype=np.int64)
    elif any(_images(part) for part in classes):
        raise BadInput(
            "the folder holds images beside sub-folders of images",
            where=f"{folder}: {beside[0].name}",
            expected="all images in sub-folders (classes), or none",
        )
    else:
        files, labels, classes = beside, None, []
    return Samples(
        source=str(folder),
        names=("image",),
        count=len(files),
        labels=labels,
        classes=tuple(part.name for part in classes),
        read=lambda: _read_all(files, preprocess),
    )


def _folders(folder: Path) -> list[Path]:
    return sorted(part for part in folder.iterdir() if part.is_dir() and not part.name.startswith("."))


def _images(folder: Path) -> list[Path]:
    return sorted(
        file
        for file in folder.iterdir()
        if file.suffix.lower() in SUFFIXES and not file.name.startswith(".") and file.is_file()
    )


def _pillow(folder: Path) -> None:
    try:
        import PIL.Image  # noqa: F401
    except ImportError as error:
        raise MissingDependency(
            "Pillow", needed_for=f"images in {folder}", install="pip install 'normfuse[images]'"
        ) from error


def _read_all(files: list[Path], preprocess: Preprocess) -> Iterator[Sample]:
    for file in files:
        yield Sample({"image": _read_one(file, preprocess)}, str(file))


def _read_one(file: Path, preprocess: Preprocess) -> Array:
    from PIL import Image

    try:
        with warnings.catch_warnings():
            # Pillow only warns of an image that is suspiciously large.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file) as image:
                return _array(_crop(_color(image, file, len(preprocess.mean)), preprocess), preprocess)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadInput(
            f"the image cannot be read: {error}", where=str(file), expected="a complete image file"
        ) from error


def _color(image: Image.Image, file: Path, channels: int) -> Image.Image:
    if image.mode not in EIGHT_BITS:
        raise BadInput(
            f"the image has pixels of type {image.mode}",
            where=str(file),
            expected="8 bits per channel",
            hint="convert it, or give arrays (.npz) as the model takes them",
        )
    if "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB" if channels == 3 else "L")


def _crop(image: Image.Image, preprocess: Preprocess) -> Image.Image:
    from PIL import Image

    height, width = preprocess.size
    shorter = min(image.size)
    scale = max((preprocess.resize or 0) / shorter, height / image.height, width / image.width)
    size = (max(round(image.width * scale), width), max(round(image.height * scale), height))
    image = image.resize(size, Image.Resampling[preprocess.interpolation.name])
    left, top = (size[0] - width) // 2, (size[1] - height) // 2
    return image.crop((left, top, left + width, top + height))


def _array(image: Image.Image, preprocess: Preprocess) -> Array:
    pixels = np.asarray(image, dtype=np.float32) / np.float32(255)
    pixels = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
    mean, std = (np.array(values, dtype=np.float32)[:, None, None] for values in (preprocess.mean, preprocess.std))
    return np.ascontiguousarray((pixels - mean) / std)
