"""Samples meet inputs: names, shapes, types, finite values."""

from pathlib import Path

import numpy as np
import pytest

from normfuse.data import InputSpec, Samples, check_samples, load_samples
from normfuse.data.samples import Array
from normfuse.errors import BadInput, UnsupportedModel

X = InputSpec("x", (None, 3, 5), "float32")


def saved(path: Path, **arrays: Array) -> Samples:
    np.savez(path / "data.npz", **arrays)  # type: ignore[arg-type]  # numpy's stub takes allow_pickle for a key
    return load_samples(path / "data.npz")


def ones(count: int = 4, dtype: str = "float32") -> Array:
    return np.ones((count, 3, 5), dtype=dtype)


def test_bound_by_name(tmp_path: Path) -> None:
    samples = saved(tmp_path, b=np.arange(8).reshape(4, 2), unused=ones(), a=ones() * 3)
    inputs = [InputSpec("a", (1, 3, None), "float32"), InputSpec("b", (None, 2), "int32")]
    checked = check_samples(samples, inputs)
    batch = next(checked.batches(4))
    assert checked.names == tuple(batch.inputs) == ("a", "b")
    assert batch.inputs["a"].max() == 3
    assert batch.inputs["b"].dtype == np.int32


def test_one_array_is_bound_by_position(tmp_path: Path) -> None:
    checked = check_samples(saved(tmp_path, arr_0=ones(), labels=np.arange(4)), [X])
    batch = next(checked.batches(4))
    assert tuple(batch.inputs) == ("x",)
    assert batch.labels is not None
    assert batch.labels.tolist() == [0, 1, 2, 3]
    assert len(checked.first(3)) == len(list(checked.first(3))) == 3


def test_names_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="the arrays p, q") as caught:
        check_samples(saved(tmp_path, p=ones(), q=ones()), [X])
    assert caught.value.expected.endswith(": x")


@pytest.mark.parametrize(
    ("shape", "hint"), [((3, 4), "axes"), ((5, 3), "axes"), ((3,), "axes"), ((1, 3, 5), "single samples")]
)
def test_wrong_shape(tmp_path: Path, shape: tuple[int, ...], hint: str) -> None:
    with pytest.raises(BadInput) as caught:
        check_samples(saved(tmp_path, x=np.ones((2, *shape), dtype=np.float32)), [X])
    assert str(list(shape)) in caught.value.what
    assert "[3, 5]" in caught.value.expected
    assert "sample 0" in caught.value.where
    assert hint in caught.value.hint


def test_empty_samples(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="is empty"):
        check_samples(
            saved(tmp_path, x=np.ones((2, 3, 0), dtype=np.float32)), [InputSpec("x", (None, 3, None), "float32")]
        )


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("size", [1, 3])
def test_a_value_that_is_not_finite_is_located(tmp_path: Path, value: float, size: int) -> None:
    array = ones(7)
    array[5, 2, 1] = value
    checked = check_samples(saved(tmp_path, x=array), [X])
    with pytest.raises(BadInput, match=str(value)) as caught:
        list(checked.batches(size))
    assert caught.value.where == f"{tmp_path / 'data.npz'}, sample 5, array 'x' at [2, 1]"


def test_the_first_sample_is_checked_at_once(tmp_path: Path) -> None:
    array = ones()
    array[0, 0, 0] = np.nan
    with pytest.raises(BadInput, match="a value is nan"):
        check_samples(saved(tmp_path, x=array), [X])


def test_the_file_is_named_in_folders(tmp_path: Path) -> None:
    for index in range(3):
        np.save(tmp_path / f"{index}.npy", np.full((3, 5), np.nan if index == 2 else 1.0))
    checked = check_samples(load_samples(tmp_path), [X])
    with pytest.raises(BadInput) as caught:
        list(checked)
    assert caught.value.where == f"{tmp_path / '2.npy'}, array 'input' at [0, 0]"


@pytest.mark.parametrize(
    ("found", "wanted"),
    [
        *(("float64", "float32"), ("float16", "float32"), ("float32", "float64"), ("float64", "float16")),
        *(("int64", "float32"), ("bool", "float32"), ("uint16", "float32"), ("int64", "int32"), ("int32", "int64")),
        *(("uint8", "int64"), ("bool", "int64"), ("int64", "bool"), (">f4", "float32")),
    ],
)
def test_cast(tmp_path: Path, found: str, wanted: str) -> None:
    checked = check_samples(saved(tmp_path, x=ones(dtype=found)), [InputSpec("x", (None, 3, 5), wanted)])
    array = next(iter(checked)).inputs["x"]
    assert array.dtype == np.dtype(wanted)
    assert (array == 1).all()


@pytest.mark.parametrize(
    ("array", "wanted", "message"),
    [
        (ones(dtype="uint8"), "float32", "is uint8"),
        (ones(), "int64", "is float32"),
        (ones(dtype="complex64"), "float32", "is complex64"),
        (np.full((2, 3, 5), "a"), "float32", "is <U1"),
        (np.full((2, 3, 5), 2**31), "int32", "does not fit into int32"),
        (np.full((2, 3, 5), -1), "uint8", "does not fit into uint8"),
        (np.full((2, 3, 5), 2**63, dtype=np.uint64), "int64", "does not fit into int64"),
        (np.full((2, 3, 5), 2), "bool", "does not fit into bool"),
        (np.full((2, 3, 5), 2**24 + 1), "float32", "does not fit into float32"),
        (np.full((2, 3, 5), 2**53 + 1), "float32", "does not fit into float32"),
        (np.full((2, 3, 5), 1e39), "float32", "too large for float32"),
        (np.full((2, 3, 5), 65520.0), "float16", "too large for float16"),
    ],
)
def test_no_cast(tmp_path: Path, array: Array, wanted: str, message: str) -> None:
    with pytest.raises(BadInput, match=message) as caught:
        check_samples(saved(tmp_path, x=array), [InputSpec("x", (None, 3, 5), wanted)])
    assert wanted in caught.value.expected
    assert "sample 0, array 'x'" in caught.value.where


def test_pixels_are_explained(tmp_path: Path) -> None:
    with pytest.raises(BadInput) as caught:
        check_samples(saved(tmp_path, x=ones(dtype="uint8")), [X])
    assert "pixels" in caught.value.hint


@pytest.mark.parametrize("dtype", ["bfloat16", "complex64", "float8"])
def test_unknown_type(tmp_path: Path, dtype: str) -> None:
    with pytest.raises(UnsupportedModel, match=dtype):
        check_samples(saved(tmp_path, x=ones()), [InputSpec("x", (None, 3, 5), dtype)])
