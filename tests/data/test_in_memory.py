"""What a program has at hand gives the same samples as a file of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from normfuse.data import Data, Preprocess, load_samples
from normfuse.errors import BadInput, UsageError

X = np.random.default_rng(0).standard_normal((5, 3, 2)).astype(np.float32)
LABELS = np.arange(5) % 3


def columns() -> Data:
    return {"x": X, "labels": LABELS}


def tensors() -> Data:
    return {"label": torch.from_numpy(LABELS), "x": torch.from_numpy(X).requires_grad_()}


def mappings() -> Data:
    return [({"x": x}, label) for x, label in zip(X, LABELS, strict=True)]


def function() -> Data:
    return lambda: (({"x": torch.from_numpy(x)}, int(label)) for x, label in zip(X, LABELS, strict=True))


@pytest.mark.parametrize("make", [columns, tensors, mappings, function])
@pytest.mark.parametrize("size", [1, 2, 5])
def test_every_form_gives_the_samples_of_the_file(tmp_path: Path, make: Callable[[], Data], size: int) -> None:
    np.savez(tmp_path / "data.npz", x=X, label=LABELS)
    found, file = load_samples(make(), name="calibration"), load_samples(tmp_path / "data.npz")
    assert (found.source, found.names, len(found)) == ("calibration", file.names, 5)
    assert found.fingerprint() == file.fingerprint()
    pairs = zip(found.batches(size), file.batches(size), strict=True)
    assert all(np.array_equal(one.inputs["x"], other.inputs["x"]) for one, other in pairs)


@pytest.mark.parametrize("data", [X, torch.from_numpy(X), list(X), tuple(X)])
def test_one_input_needs_no_name(data: Data) -> None:
    found = load_samples(data)
    (name,) = found.names
    assert found.labels is None
    assert np.array_equal(next(found.batches(5)).inputs[name], X)


def test_samples_stay_what_they_are() -> None:
    samples = load_samples(X)
    assert load_samples(samples) is samples


@pytest.mark.parametrize(
    ("data", "error", "says"),
    [
        (3, UsageError, "the samples are a int"),
        (b"bytes", UsageError, "the samples are a bytes"),
        (iter(X), UsageError, "give a function that returns the iterable"),
        ({}, BadInput, "there are no arrays"),
        ({"x": X, "y": X[:4]}, BadInput, r"different lengths: x \[5, 3, 2\], y \[4, 3, 2\]"),
        (np.float32(3), BadInput, "different lengths"),
        ({"x": X, "label": LABELS[:4]}, BadInput, "4 labels for 5 samples"),
        ({"x": X, "label": LABELS / 2}, BadInput, "labels are float64"),
        ({"x": "a.png"}, BadInput, "no array of numbers but str"),
        (["a.png", "b.png"], BadInput, "no array of numbers but str"),
        ([], BadInput, "there are no samples"),
    ],
)
def test_what_is_no_samples(data: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error) as caught:
        load_samples(data, name="calibration")
    assert says.replace("\\", "") in str(caught.value)
    assert "calibration" in str(caught.value)


def test_preprocess_is_for_images_only() -> None:
    with pytest.raises(UsageError, match="only for folders of images"):
        load_samples(X, preprocess=Preprocess.parse("imagenet"))
