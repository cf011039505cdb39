"""TorchScript archives load in eval mode, and do not touch files."""

import warnings
import zipfile
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from normfuse.errors import BadInput
from normfuse.loading import ModelKind, load_model


class Saving(nn.Module):
    """Writes its input to a file."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path

    def forward(self, x: Tensor) -> Tensor:
        torch.save(x, self.path)
        return x


def scripted(model: nn.Module, path: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(model), str(path))
    return path


def test_loads_in_eval_mode(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3), nn.Dropout(0.5))
    model(torch.randn(7, 5))
    loaded = load_model(scripted(model.train(), tmp_path / "m.zip"))
    x = torch.randn(4, 5)
    assert loaded.kind is ModelKind.TORCHSCRIPT
    assert isinstance(loaded.model, torch.jit.ScriptModule)
    assert torch.equal(loaded.model(x), model.eval()(x))


def test_file_access_is_refused(tmp_path: Path) -> None:
    path = scripted(Saving(str(tmp_path / "trace")), tmp_path / "m.pt")
    with pytest.raises(BadInput, match="opens files") as caught:
        load_model(path)
    assert "code/" in caught.value.where
    assert load_model(path, trust_pickle=True).kind is ModelKind.TORCHSCRIPT


def test_broken_program(tmp_path: Path) -> None:
    path, broken = scripted(nn.Linear(3, 2), tmp_path / "m.pt"), tmp_path / "broken.pt"
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(broken, "w") as target:
        for name in source.namelist():
            target.writestr(name, source.read(name)[:-40] if name.endswith(".py") else source.read(name))
    with pytest.raises(BadInput, match="TorchScript archive is broken"):
        load_model(broken)
