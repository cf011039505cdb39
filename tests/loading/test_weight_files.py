"""State dicts, safetensors and pickles: what fits loads, what does not is named, nothing runs unasked."""

import importlib
import os
import pickle
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from normfuse.errors import BadInput, UsageError
from normfuse.loading import ModelKind, load_model

ARCH = "arch_for_tests:build"
SOURCE = """
from torch import nn
class Net(nn.Sequential):
    pass
def build():
    return Net(nn.Linear(5, 3), nn.BatchNorm1d(3), nn.Dropout(0.3))
def build_wider():
    return nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7))
def broken():
    raise KeyError("no config")
def not_a_module():
    return {"a": 1}
number = 3
"""


@pytest.fixture(autouse=True)
def arch_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "package"
    package.mkdir()
    (package / "arch_for_tests.py").write_text(SOURCE)
    (package / "bad_syntax_for_tests.py").write_text("def build(:")
    (package / "bad_name_for_tests.py").write_text("build = torch.nn.Linear")
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "arch_for_tests", raising=False)
    monkeypatch.chdir(package)


def network() -> nn.Module:
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3), nn.Dropout(0.3))
    model(torch.randn(11, 5))  # random statistics
    return model


class Evil:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("nesting", ["", "state_dict", "model", "model_state_dict"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod."])
@pytest.mark.parametrize("legacy", [False, True])
def test_state_dict(tmp_path: Path, nesting: str, prefix: str, legacy: bool) -> None:
    expected = network().eval()
    weights = {prefix + name: tensor for name, tensor in expected.state_dict().items()}
    path = tmp_path / "weights.bin"
    saved = {nesting: weights, "epoch": 3} if nesting else weights
    torch.save(saved, path, _use_new_zipfile_serialization=not legacy)

    loaded = load_model(path, arch=ARCH)

    x = torch.randn(4, 5)
    assert loaded.kind is ModelKind.STATE_DICT
    assert isinstance(loaded.model, nn.Module)
    assert not any(module.training for module in loaded.model.modules())
    assert torch.equal(loaded.model(x), expected(x))


def test_safetensors(tmp_path: Path) -> None:
    expected = network().eval()
    path = tmp_path / "model.pt"
    save_file(expected.state_dict(), path)

    loaded = load_model(path, arch=ARCH)

    x = torch.randn(4, 5)
    assert loaded.kind is ModelKind.SAFETENSORS
    assert isinstance(loaded.model, nn.Module)
    assert torch.equal(loaded.model(x), expected(x))
    assert loaded.path == path
    assert len(loaded.sha256) == 64


def test_truncated_safetensors(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file(network().state_dict(), path)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(BadInput, match="cannot be read"):
        load_model(path, arch=ARCH)


def test_weights_need_arch(tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    torch.save(network().state_dict(), path)
    with pytest.raises(UsageError, match="weights only") as caught:
        load_model(path)
    assert "--arch" in caught.value.hint


@pytest.mark.parametrize(
    ("arch", "error", "message"),
    [
        ("arch_for_tests", UsageError, "wrong form"),
        (":build", UsageError, "wrong form"),
        ("no_such_package:build", UsageError, "cannot be imported"),
        ("arch_for_tests:buidl", UsageError, "cannot be imported"),
        ("bad_syntax_for_tests:build", UsageError, r"SyntaxError: .*bad_syntax_for_tests\.py, line 1"),
        ("bad_name_for_tests:build", UsageError, "cannot be imported: NameError"),
        ("arch_for_tests:number", BadInput, "is a int"),
        ("arch_for_tests:not_a_module", BadInput, "returned dict"),
        ("arch_for_tests:broken", BadInput, "raised KeyError"),
    ],
)
def test_bad_arch(tmp_path: Path, arch: str, error: type[BadInput | UsageError], message: str) -> None:
    path = tmp_path / "w.pt"
    torch.save(network().state_dict(), path)
    with pytest.raises(error, match=message) as caught:
        load_model(path, arch=arch)
    assert caught.value.where == arch


def test_other_keys_are_named(tmp_path: Path) -> None:
    weights = dict(network().state_dict())
    weights["head.weight"] = weights.pop("0.weight")
    path = tmp_path / "w.pt"
    torch.save(weights, path)
    with pytest.raises(BadInput, match=r"missing: 0\.weight; unexpected: head\.weight"):
        load_model(path, arch=ARCH)


def test_other_shapes_are_named(tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    torch.save(network().state_dict(), path)
    with pytest.raises(BadInput, match=r"0\.weight \[3, 5\] instead of \[7, 5\]"):
        load_model(path, arch="arch_for_tests:build_wider")


@pytest.mark.parametrize("found", [torch.ones(3), {}, {"epoch": 3}, [torch.ones(2)], {"a": {"b": torch.ones(1)}}])
def test_no_weights(tmp_path: Path, found: object) -> None:
    path = tmp_path / "w.pt"
    torch.save(found, path)
    with pytest.raises(BadInput, match="no weights in it"):
        load_model(path, arch=ARCH)


@pytest.mark.parametrize("legacy", [False, True])
def test_pickled_module_needs_trust(tmp_path: Path, legacy: bool) -> None:
    model = network()
    path = tmp_path / "model.pt"
    torch.save(model, path, _use_new_zipfile_serialization=not legacy)

    with pytest.raises(BadInput, match="unpickling runs code") as caught:
        load_model(path)
    assert "trust" in caught.value.hint

    loaded = load_model(path, trust_pickle=True)
    assert loaded.kind is ModelKind.PICKLE
    assert isinstance(loaded.model, nn.Module)
    assert not any(module.training for module in loaded.model.modules())
    with pytest.raises(UsageError, match="its own network"):
        load_model(path, arch=ARCH, trust_pickle=True)


def pickled(path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Save a module of a class that only the current folder defines, and forget the class."""
    with monkeypatch.context() as patch:
        patch.setattr(sys, "path", [*sys.path, str(Path.cwd())])
        torch.save(importlib.import_module("arch_for_tests").build(), path)
    del sys.modules["arch_for_tests"]
    return path


def test_a_pickled_module_of_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load_model(pickled(tmp_path / "model.pt", monkeypatch), trust_pickle=True)
    assert type(loaded.model).__module__ == "arch_for_tests"


@pytest.mark.parametrize("other", [None, ""], ids=["no module", "no class"])
def test_a_pickled_module_whose_class_is_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other: str | None
) -> None:
    path, folder = pickled(tmp_path / "model.pt", monkeypatch), tmp_path / "elsewhere"
    folder.mkdir()
    monkeypatch.chdir(folder)
    if other is not None:
        (folder / "arch_for_tests.py").write_text(other)
    with pytest.raises(BadInput, match=r"cannot be restored: .*arch_for_tests") as caught:
        load_model(path, trust_pickle=True)
    assert caught.value.where == str(path)
    assert "run from the folder" in caught.value.hint
    assert "--arch" in caught.value.hint


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("nested", [False, True])
def test_hostile_pickle_never_runs(tmp_path: Path, legacy: bool, nested: bool) -> None:
    trace, path = tmp_path / "trace", tmp_path / "model.pt"
    hostile = {"state_dict": network().state_dict(), "extra": Evil(trace)} if nested else Evil(trace)
    torch.save(hostile, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(BadInput, match="unpickling runs code"):
        load_model(path, arch=ARCH)
    assert not trace.exists()

    # The payload works: with trust it does run, so the test above can fail.
    if nested:
        load_model(path, arch=ARCH, trust_pickle=True)
    else:
        with pytest.raises(BadInput, match="no weights in it"):
            load_model(path, trust_pickle=True)
    assert trace.exists()


def test_plain_hostile_pickle_is_not_opened_even_with_trust(tmp_path: Path) -> None:
    trace, path = tmp_path / "trace", tmp_path / "model.pt"
    path.write_bytes(pickle.dumps(Evil(trace)))
    with pytest.raises(BadInput, match="plain pickle"):
        load_model(path, trust_pickle=True)
    assert not trace.exists()
