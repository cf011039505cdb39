"""Every kind of file that is no model says what it is."""

import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn

from normfuse.errors import BadInput
from normfuse.loading import load_model
from normfuse.loading.content import Content, recognize


def onnx_bytes() -> bytes:
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2, 3]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", value[:1], value[1:])
    return bytes(onnx.ModelProto.SerializeToString(helper.make_model(graph, producer_name="tests")))


def write_npz(path: Path) -> None:
    with path.open("wb") as file:
        np.savez(file, x=np.zeros((2, 3)))


def write_zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "hello")


def write_old_export(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("version", "8.7")
        archive.writestr("serialized_exported_program.json", "{}")


STRANGERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda path: None, "does not exist"),
    "folder": (lambda path: path.mkdir(), "is a folder"),
    "empty": (lambda path: path.write_bytes(b""), "is empty"),
    "text": (lambda path: path.write_text("import torch\n" * 9), "is no model file"),
    "noise": (lambda path: path.write_bytes(np.random.default_rng(3).bytes(997)), "is no model file"),
    "one byte": (lambda path: path.write_bytes(b"\x08"), "is no model file"),
    "onnx": (lambda path: path.write_bytes(onnx_bytes()), "is an ONNX file"),
    "plain pickle": (lambda path: path.write_bytes(pickle.dumps({"a": 1})), "a plain pickle"),
    "npz": (write_npz, "is an .npz file"),
    "other zip": (write_zip, "holds no model"),
    "torch 2.7": (write_old_export, "torch 2.7 or older"),
}


@pytest.mark.parametrize("case", STRANGERS)
def test_stranger(tmp_path: Path, case: str) -> None:
    write, message = STRANGERS[case]
    path = tmp_path / "model.pt"
    write(path)

    with pytest.raises(BadInput, match=message) as caught:
        load_model(path)

    assert caught.value.exit_code == 4
    assert str(path) in caught.value.where
    assert caught.value.expected
    assert caught.value.hint


def test_a_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.pt"
    torch.save(nn.Linear(37, 19).state_dict(), path)

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", refuse)  # not chmod: a superuser reads such files
    with pytest.raises(BadInput, match="cannot be read: Permission denied") as caught:
        load_model(path)
    assert caught.value.where == str(path)


@pytest.mark.parametrize("keep", [0.2, 0.6, 0.97])
def test_truncated_archive(tmp_path: Path, keep: float) -> None:
    whole = tmp_path / "whole.pt"
    torch.save(nn.Linear(37, 19).state_dict(), whole)
    content = whole.read_bytes()
    cut = tmp_path / "cut.pt"
    cut.write_bytes(content[: int(len(content) * keep)])

    with pytest.raises(BadInput, match="broken or cut off"):
        load_model(cut, arch="torch.nn:Identity")


def test_a_member_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "twice.pt"
    torch.save({"a": torch.ones(2)}, path)
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr(next(name for name in archive.namelist() if name.endswith("data.pkl")), b"other")

    with pytest.raises(BadInput, match="a member twice"):
        load_model(path)


def test_the_name_does_not_matter(tmp_path: Path) -> None:
    path = tmp_path / "weights.onnx"
    torch.save({"a": torch.ones(2)}, path)
    assert recognize(path) is Content.TORCH_ZIP
    torch.save({"a": torch.ones(2)}, path, _use_new_zipfile_serialization=False)
    assert recognize(path) is Content.TORCH_LEGACY
