"""NumPy files: read without pickle, as a stream; what is wrong with them is said."""

import os
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from normfuse.data import Preprocess, load_samples
from normfuse.errors import BadInput, UsageError


class Evil:
    """Leaves a folder behind when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.path),)


def objects(trace: Path) -> "np.ndarray[tuple[int], np.dtype[np.object_]]":
    array = np.empty(3, dtype=object)
    array[:] = [Evil(trace)] * 3
    return array


@pytest.mark.parametrize("name", ["x", "labels"])
def test_objects_in_npz_are_refused(tmp_path: Path, name: str) -> None:
    trace, path = tmp_path / "trace", tmp_path / "data.npz"
    np.savez(path, **{"x": np.ones((3, 2)), name: objects(trace)})  # type: ignore[arg-type]  # as below
    with pytest.raises(BadInput, match="Python objects") as caught:
        load_samples(path)
    assert f"{name}.npy" in caught.value.where
    assert not trace.exists()


@pytest.mark.parametrize("name", ["b", "labels"])
def test_objects_in_npy_are_refused(tmp_path: Path, name: str) -> None:
    trace, folder = tmp_path / "trace", tmp_path / "data"
    folder.mkdir()
    np.save(folder / "a.npy", np.ones(2))
    np.save(folder / f"{name}.npy", objects(trace), allow_pickle=True)
    with pytest.raises(BadInput, match="Python objects") as caught:
        list(load_samples(folder))
    assert f"{name}.npy" in caught.value.where
    assert not trace.exists()


def test_structured_arrays_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", x=np.zeros(3, dtype=[("a", "f4"), ("b", "i4")]))
    with pytest.raises(BadInput, match="Python objects"):
        load_samples(tmp_path / "data.npz")


@pytest.mark.parametrize("compressed", [False, True])
def test_npz_is_streamed(tmp_path: Path, compressed: bool) -> None:
    count, path = 400, tmp_path / "data.npz"
    whole = np.random.default_rng(1).standard_normal((count, 50, 50)).astype(np.float32)
    (np.savez_compressed if compressed else np.savez)(path, x=whole)
    samples = load_samples(path)
    tracemalloc.start()
    total = sum(float(batch.inputs["x"].sum(dtype=np.float64)) for batch in samples.batches(4))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # Sums of 2500 values of either order differ by at most count * 2500 * eps * sum|x| in float64, far below 1e-6.
    assert abs(total - float(whole.sum(dtype=np.float64))) < 1e-6
    # A batch of 4 and its 4 rows, read and copied, are 160 kB; the whole array is 4 MB.
    assert peak < whole.nbytes / 4


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({}, "there are no arrays"),
        ({"labels": np.arange(3)}, "there are no arrays"),
        ({"x": np.ones((0, 3))}, "no samples"),
        ({"x": np.float32(3)}, "different lengths"),
        ({"x": np.ones((3, 2)), "y": np.ones((4, 2))}, r"different lengths: x \[3, 2\], y \[4, 2\]"),
        ({"x": np.ones((3, 2)), "labels": np.arange(2)}, "2 labels for 3 samples"),
        ({"x": np.ones((3, 2)), "label": np.ones(3)}, "labels are float64"),
        ({"x": np.ones((3, 2)), "label": np.int64(1)}, "labels are int64"),
    ],
)
def test_bad_npz(
    tmp_path: Path, arrays: dict[str, "np.ndarray[tuple[int, ...], np.dtype[np.float64]]"], message: str
) -> None:
    np.savez(tmp_path / "data.npz", **arrays)  # type: ignore[arg-type]  # numpy's stub takes allow_pickle for a key
    with pytest.raises(BadInput, match=message) as caught:
        load_samples(tmp_path / "data.npz")
    assert "data.npz" in caught.value.where


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04" + bytes(50)])
def test_no_npz(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "data.npz"
    path.write_bytes(content)
    with pytest.raises(BadInput, match="cannot be read"):
        load_samples(path)


def test_damaged_content_is_found(tmp_path: Path) -> None:
    path = tmp_path / "data.npz"
    np.savez(path, x=np.ones((5, 301)))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    samples = load_samples(path)
    with pytest.raises(BadInput, match="cannot be read: Bad CRC"):
        list(samples)


def test_one_file_is_one_sample(tmp_path: Path) -> None:
    for index in (2, 0, 1):
        np.save(tmp_path / f"{index}.npy", np.full((3, 2), index))
    np.save(tmp_path / "labels.npy", np.array([7, 8, 9], dtype=np.uint8))
    (tmp_path / "notes").mkdir()
    samples = load_samples(tmp_path)
    batch = next(samples.batches(3))
    assert batch.inputs["input"].shape == (3, 3, 2)
    assert batch.inputs["input"][:, 0, 0].tolist() == [0, 1, 2]
    assert batch.labels is not None
    assert batch.labels.tolist() == [7, 8, 9]


def test_different_shapes_need_batches_of_one(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.ones((3, 2)))
    np.save(tmp_path / "b.npy", np.ones((4, 2)))
    samples = load_samples(tmp_path)
    assert [batch.inputs["input"].shape for batch in samples] == [(1, 3, 2), (1, 4, 2)]
    with pytest.raises(BadInput, match="samples differ") as caught:
        list(samples.batches(2))
    assert "b.npy" in caught.value.where


def test_bad_folders(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="holds no samples"):
        load_samples(tmp_path)
    for name, file in (("x", "a.npy"), ("x", "b.npy"), ("y", "a.npy")):
        (tmp_path / name).mkdir(exist_ok=True)
        np.save(tmp_path / name / file, np.ones(2))
    with pytest.raises(BadInput, match=r"x and y differ: b\.npy"):
        load_samples(tmp_path)
    np.save(tmp_path / "a.npy", np.ones(2))
    with pytest.raises(BadInput, match="mixes"):
        load_samples(tmp_path)


def test_cut_npy(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.ones((31, 2)))
    content = (tmp_path / "a.npy").read_bytes()
    (tmp_path / "b.npy").write_bytes(content[:-8])
    with pytest.raises(BadInput, match="cannot be read") as caught:
        list(load_samples(tmp_path))
    assert "b.npy" in caught.value.where


def test_preprocess_is_for_images_only(tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", x=np.ones((3, 2)))
    for source in (tmp_path / "data.npz", "package.module:samples"):
        with pytest.raises(UsageError, match="only for folders of images"):
            load_samples(source, preprocess=Preprocess.parse("imagenet"))
