from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from normfuse.bench.inputs import Wanted, make_inputs, write_inputs
from normfuse.data import Sample, Samples
from normfuse.errors import BadInput

WANTED = [
    Wanted("image", (None, 3, 5), np.dtype(np.float32)),
    Wanted("token", (None, None), np.dtype(np.int64)),
    Wanted("mask", (7, 2), np.dtype(np.bool_)),
    Wanted("scale", (), np.dtype(np.float16)),
]


def test_random_inputs_are_seeded_normal_and_fit() -> None:
    first, again, other = (make_inputs(WANTED, batch=64, seed=seed) for seed in (1, 1, 2))
    assert {name: (array.shape, array.dtype.name) for name, array in first.items()} == {
        "image": ((64, 3, 5), "float32"),
        "token": ((64, 1), "int64"),
        "mask": ((7, 2), "bool"),
        "scale": ((), "float16"),
    }
    assert all(np.array_equal(first[name], again[name]) for name in first)
    assert not np.array_equal(first["image"], other["image"])
    # 960 standard normal values: the mean is within 5 standard errors, and none is zero.
    assert abs(first["image"].mean()) < 5 / np.sqrt(960)
    assert 0.8 < first["image"].std() < 1.2
    assert np.count_nonzero(first["image"]) == 960
    assert set(np.unique(first["token"])) == {0, 1}


def test_a_fixed_batch_must_be_the_one_asked_for() -> None:
    fixed = [Wanted("x", (4, 3), np.dtype(np.float32))]
    assert make_inputs(fixed, batch=4, seed=0)["x"].shape == (4, 3)
    with pytest.raises(BadInput, match="batches of 4 only"):
        make_inputs(fixed, batch=2, seed=0)


def test_a_file_without_the_input_or_broken_is_refused(tmp_path: Path) -> None:
    wanted = [Wanted("x", (None, 3), np.dtype(np.float32))]
    path = tmp_path / "inputs.npz"
    np.savez(path, y=np.zeros((2, 3)))
    with pytest.raises(BadInput, match="no samples of x"):
        make_inputs(wanted, batch=2, seed=0, source=path)
    np.savez(path, x=np.zeros((0, 3)))
    with pytest.raises(BadInput, match="no samples of x"):
        make_inputs(wanted, batch=2, seed=0, source=path)
    np.savez(path, x=np.array([{"a": 1}], dtype=object))
    with pytest.raises(BadInput, match="cannot be read"):
        make_inputs(wanted, batch=2, seed=0, source=path)
    path.write_bytes(b"PK\x03\x04 no zip")
    with pytest.raises(BadInput, match="cannot be read"):
        make_inputs(wanted, batch=2, seed=0, source=path)


def test_samples_of_a_file_are_cut_and_repeated(tmp_path: Path) -> None:
    path = tmp_path / "inputs.npz"
    np.savez(path, x=np.arange(6.0).reshape(3, 2))
    wanted = [Wanted("x", (None, 2), np.dtype(np.float32))]
    assert make_inputs(wanted, batch=2, seed=0, source=path)["x"].tolist() == [[0, 1], [2, 3]]
    assert make_inputs(wanted, batch=4, seed=0, source=path)["x"].tolist() == [[0, 1], [2, 3], [4, 5], [0, 1]]


def test_samples_written_for_a_measurement_are_read_back_alike(tmp_path: Path) -> None:
    shapes = [(5,), (4,), (5,), (5,)]
    kept = [
        Sample({"file": np.full(shape, index, np.float32), "scale": np.array(index + 2, np.float16)}, f"sample {index}")
        for index, shape in enumerate(shapes)
    ]
    samples = Samples(source="test", names=("file", "scale"), count=4, read=lambda: iter(kept))
    path = write_inputs(tmp_path / "inputs.npz", samples, batch=3)
    wanted = [Wanted("file", (None, None), np.dtype(np.float32)), Wanted("scale", (), np.dtype(np.float16))]
    found = make_inputs(wanted, batch=3, seed=0, source=path)
    assert found["file"][:, 0].tolist() == [0, 2, 0], "the sample of another length is left out, the rest repeated"
    assert found["file"].shape == (3, 5)
    assert (found["scale"].shape, float(found["scale"])) == ((), 2.0)
