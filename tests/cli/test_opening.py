"""``--preprocess`` is used for the images among a command's samples, or refused, and never ignored."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from normfuse.cli.opening import opened_model, opened_samples
from normfuse.errors import UsageError
from normfuse.progress import Advance

PRESET = "mean=0.5;std=0.25;size=5"


@pytest.fixture
def images(tmp_path: Path) -> str:
    (tmp_path / "images").mkdir()
    Image.new("L", (7, 6), 128).save(tmp_path / "images" / "gray.png")
    return str(tmp_path / "images")


@pytest.fixture
def arrays(tmp_path: Path) -> str:
    np.savez(tmp_path / "data.npz", x=np.zeros((3, 1, 5, 5), dtype=np.float32))
    return str(tmp_path / "data.npz")


class Watched:
    """Remembers the tasks."""

    def __init__(self) -> None:
        self.tasks: list[str] = []

    @contextmanager
    def task(self, label: str, total: int | None = None) -> Iterator[Advance]:
        self.tasks.append(label)
        yield lambda steps: None


def test_it_is_used_where_the_images_are(images: str, arrays: str) -> None:
    for source, other in ((images, None), (images, arrays), (images, images), (arrays, images)):
        samples = opened_samples(source, PRESET, other=other)
        assert samples is not None
        (array,) = next(iter(samples)).inputs.values()
        assert array.shape == (1, 1, 5, 5)


def test_without_images_it_is_refused(arrays: str, tmp_path: Path) -> None:
    (tmp_path / "npy").mkdir()
    np.save(tmp_path / "npy" / "0.npy", np.zeros(3))
    for source, other in ((arrays, None), (arrays, arrays), (str(tmp_path / "npy"), arrays)):
        with pytest.raises(UsageError, match="preprocess is only for folders of images"):
            opened_samples(source, PRESET, other=other)
    with pytest.raises(UsageError, match="no samples to preprocess"):
        opened_samples(None, PRESET)
    with pytest.raises(UsageError, match="preprocess cannot be read"):
        opened_samples(arrays, "")


def test_what_is_not_given_is_none(arrays: str) -> None:
    assert opened_samples(None, None) is None
    assert opened_samples(None, PRESET, other=arrays) is None


def test_opening_is_shown(arrays: str, tmp_path: Path) -> None:
    shown = Watched()
    opened_samples(arrays, None, progress=shown)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(torch.nn.ReLU()), str(tmp_path / "model.pt"))
    opened_model(tmp_path / "model.pt", arch=None, trust_pickle=False, progress=shown)
    assert shown.tasks == ["opening the samples", "loading the model"]
