"""Samples: the same stream at every batch size, counted, labelled, fingerprinted."""

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from normfuse.data import Samples, load_samples
from normfuse.data.samples import Array
from normfuse.errors import BadInput, UsageError

COUNT = 11


def arrays() -> dict[str, Array]:
    random = np.random.default_rng(7)
    return {
        "x": random.standard_normal((COUNT, 3, 5)).astype(np.float32),
        "y": random.integers(0, 9, (COUNT, 2)),
        "labels": random.integers(0, 4, COUNT),
    }


def save(path: Path, arrays: dict[str, Array]) -> None:
    np.savez(path, **arrays)  # type: ignore[arg-type]  # numpy's stub takes allow_pickle for a key


SOURCE = """
import numpy as np, torch
from itertools import count
DATA = dict(np.load("data.npz"))
calls = count()
once = iter([np.ones(3), np.ones(3)])
def mappings():
    return ({"x": x, "y": torch.from_numpy(y)} for x, y in zip(DATA["x"], DATA["y"]))
def pairs():
    return [({"x": x, "y": y}, label) for x, y, label in zip(DATA["x"], DATA["y"], DATA["labels"])]
def tensors():
    for x in DATA["x"]: yield torch.tensor(x, requires_grad=True)
def only_once():
    return once
def shrinking():
    return [np.ones(3)] * (5 - next(calls))
def nothing():
    return []
def mapping():
    return dict(DATA)
def number():
    return 3
def triples():
    return [(1, 2, 3)]
def strings():
    return ["a.png", "b.png"]
def ragged():
    return [{"x": [[1, 2], [3]]}]
def other_names():
    return [{"x": np.ones(2)}, {"z": np.ones(2)}]
def some_labels():
    return [(np.ones(2), 1), np.ones(2)]
def float_labels():
    return [(np.ones(2), 1.5)]
def raises():
    raise FileNotFoundError("no data.bin")
def raises_later():
    yield np.ones(3)
    yield DATA["q"]
bfloat16 = lambda: [torch.ones(2, dtype=torch.bfloat16)]
sparse = lambda: [torch.ones(2).to_sparse()]
not_callable = 3
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    save(tmp_path / "data.npz", arrays())
    (tmp_path / "samples_for_tests.py").write_text(SOURCE)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "samples_for_tests", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_npy(folder: Path) -> Path:
    for name in ("x", "y"):
        (folder / "npy" / name).mkdir(parents=True)
        for index, array in enumerate(arrays()[name]):
            np.save(folder / "npy" / name / f"{index:03}.npy", array)
    np.save(folder / "npy" / "labels.npy", arrays()["labels"])
    return folder / "npy"


def sources(folder: Path) -> Iterator[Samples]:
    np.savez_compressed(folder / "small.npz", **arrays())  # type: ignore[arg-type]  # as above
    save(folder / "fortran.npz", {name: np.asfortranarray(array) for name, array in arrays().items()})
    for source in ("data.npz", "small.npz", "fortran.npz"):
        yield load_samples(folder / source)
    yield load_samples(write_npy(folder))
    yield load_samples("samples_for_tests:pairs")


@pytest.mark.parametrize("size", [1, 3, 7, COUNT, 100])
def test_every_source_gives_the_same_samples_at_every_batch_size(folder: Path, size: int) -> None:
    expected = arrays()
    for samples in sources(folder):
        for _ in range(2):  # every run starts anew
            batches = list(samples.batches(size))
            assert [len(batch) for batch in batches[:-1]] == [size] * (len(batches) - 1)
            for name in ("x", "y"):
                joined = np.concatenate([batch.inputs[name] for batch in batches])
                assert joined.dtype == expected[name].dtype
                assert np.array_equal(joined, expected[name])
            labels = [batch.labels for batch in batches if batch.labels is not None]
            assert np.array_equal(np.concatenate(labels), expected["labels"])
        assert len(samples) == COUNT
        assert samples.names == ("x", "y")


def test_iteration_gives_batches_of_one(folder: Path) -> None:
    shapes = [batch.inputs["x"].shape for batch in load_samples(folder / "data.npz")]
    assert shapes == [(1, 3, 5)] * COUNT


@pytest.mark.parametrize(("asked", "given"), [(1, 1), (4, 4), (COUNT, COUNT), (99, COUNT)])
def test_first(folder: Path, asked: int, given: int) -> None:
    for samples in sources(folder):
        first = samples.first(asked)
        assert len(first) == len(list(first)) == given
        assert first.labels is not None
        assert np.array_equal(first.labels, arrays()["labels"][:given])
        assert np.array_equal(np.concatenate([batch.inputs["x"] for batch in first]), arrays()["x"][:given])


def test_first_none(folder: Path) -> None:
    with pytest.raises(BadInput, match="no samples"):
        load_samples(folder / "data.npz").first(0)


def test_fingerprint_follows_the_content_and_not_the_container(folder: Path) -> None:
    prints = {samples.fingerprint() for samples in sources(folder)}
    assert len(prints) == 1
    changed = arrays()
    changed["x"][COUNT - 1, 2, 4] = np.nextafter(changed["x"][COUNT - 1, 2, 4], np.float32(9))
    save(folder / "changed.npz", changed)
    relabelled = arrays()
    relabelled["labels"][0] += 1
    save(folder / "relabelled.npz", relabelled)
    others = {load_samples(folder / name).fingerprint() for name in ("changed.npz", "relabelled.npz")}
    assert len(others | prints) == 3


def test_batch_size_must_be_positive(folder: Path) -> None:
    with pytest.raises(UsageError, match="batch size is 0"):
        next(load_samples(folder / "data.npz").batches(0))


def test_callable_of_tensors_and_mappings() -> None:
    tensors = load_samples("samples_for_tests:tensors")
    assert tensors.labels is None
    assert np.array_equal(next(tensors.batches(COUNT)).inputs["input"], arrays()["x"])
    mappings = load_samples("samples_for_tests:mappings")
    assert np.array_equal(next(mappings.batches(COUNT)).inputs["y"], arrays()["y"])
    assert torch.from_numpy(next(iter(mappings)).inputs["x"]).shape == (1, 3, 5)


@pytest.mark.parametrize("name", ["only_once", "shrinking"])
def test_callable_must_give_the_same_every_time(name: str) -> None:
    samples = load_samples(f"samples_for_tests:{name}")
    with pytest.raises(BadInput, match="at first and"):
        list(samples)


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("nothing", BadInput, "no samples"),
        ("number", UsageError, "returned int"),
        ("mapping", UsageError, "returned a dict, which iterates over names"),
        ("strings", BadInput, "no array of numbers but str"),
        ("not_callable", UsageError, "this is a int"),
        ("missing", UsageError, "cannot be imported"),
        ("triples", BadInput, "tuple of 3"),
        ("ragged", BadInput, "no array"),
        ("other_names", BadInput, "has z where earlier ones have x"),
        ("some_labels", BadInput, "1 of 2 samples have no label"),
        ("float_labels", BadInput, "labels are float64"),
        ("bfloat16", BadInput, "no array"),
        ("sparse", BadInput, "no array"),
        ("raises", BadInput, "raised FileNotFoundError: no data.bin"),
        ("raises_later", BadInput, "raised KeyError"),
    ],
)
def test_bad_callables(name: str, error: type[BadInput | UsageError], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        load_samples(f"samples_for_tests:{name}")
    assert "samples_for_tests" in caught.value.where


def test_the_sample_that_raised_is_named() -> None:
    with pytest.raises(BadInput) as caught:
        load_samples("samples_for_tests:raises_later")
    assert caught.value.where == "samples_for_tests:raises_later, sample 1"


@pytest.mark.parametrize(
    ("content", "message"), [("def make(:", "SyntaxError"), ("make = undefined", "NameError"), ("1 / 0", "ZeroDiv")]
)
def test_a_module_that_cannot_be_run(folder: Path, content: str, message: str) -> None:
    name = f"broken_{message}"
    (folder / f"{name}.py").write_text(content)
    with pytest.raises(UsageError, match=f"cannot be imported: {message}"):
        load_samples(f"{name}:make")


def test_a_source_that_may_not_be_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "iterdir", refuse)  # not chmod: a superuser reads such folders
    with pytest.raises(BadInput, match="cannot be read: Permission denied") as caught:
        load_samples(folder)
    assert caught.value.where == str(folder)


def test_missing_module() -> None:
    with pytest.raises(UsageError, match="cannot be imported"):
        load_samples("no_such_package.data:samples")
    with pytest.raises(BadInput, match="do not exist"):
        load_samples("no/such/file.npz")
