"""However a TorchScript program spells an operator that opens files, it is refused; what models are made of is not."""

import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from normfuse.errors import BadInput
from normfuse.loading import load_model

CALL = "torch.save(x, path)"
SPELLINGS = {
    "blank": "torch . save(x, path)",
    "tab": "torch.\tsave(x, path)",
    "broken line": "torch.\\\n    save(x, path)",
    "comment": "(torch. # nothing to see\n    save)(x, path)",
    "brackets": "(torch).save(x, path)",
    "operator's own space": "ops.aten . save(x, path)",
    "another name": "t = torch\n    t.save(x, path)",
    "getattr": 'getattr(torch, "save")(x, path)',
    "two literals": 'getattr(torch, "sa" "ve")(x, path)',
    "octal": 'getattr(torch, "s\\141ve")(x, path)',
    "long quotes": "getattr(torch, '''save''')(x, path)",
    "getattr by another name": 'g = getattr\n    g(torch, "sa" "ve")(x, path)',
    "two literals on two lines": 'getattr(torch, "sa"\n "ve")(x, path)',
}
UNKNOWN_TO_TORCH = {
    "unknown escape": 'getattr(torch, "\\save")(x, path)',
    "not a literal": "getattr(torch, path)(x, path)",
    "not Python": "torch.save(x, path))",
    "reads a file": "y = torch . from_file(path)",
}


class Saving(nn.Module):
    """Writes its input to a file."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path

    def forward(self, x: Tensor) -> Tensor:
        torch.save(x, self.path)
        return x


class Branches(nn.Module):
    """Uses what the serializer writes with getattr, annotations and texts."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({"a-b": nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)), "c": nn.ReLU()})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        if x.dim() != 2:
            raise ValueError(f'save "your" breath\n{x.dim()}')
        for layer in self.layers.values():
            x = layer(x)
        return {"it's": x}


def written(model: nn.Module, path: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(model.eval()), str(path))
    return path


def with_program(source: Path, target: Path, change: Callable[[str], str]) -> Path:
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            new.writestr(name, change(content.decode()) if name.endswith(".py") else content)
    return target


@pytest.mark.parametrize("case", SPELLINGS | UNKNOWN_TO_TORCH)
def test_a_spelling_is_refused(tmp_path: Path, case: str) -> None:
    spelling = (SPELLINGS | UNKNOWN_TO_TORCH)[case]
    saving = written(Saving(str(tmp_path / "trace")), tmp_path / "saving.pt")
    hostile = with_program(saving, tmp_path / "hostile.pt", lambda text: text.replace(CALL, spelling))
    with pytest.raises(BadInput, match="TorchScript") as caught:
        load_model(hostile)
    assert "code/" in caught.value.where
    assert "--trust-pickle" in caught.value.hint
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize("case", SPELLINGS)
def test_the_attacks_are_real(tmp_path: Path, case: str) -> None:
    saving = written(Saving(str(tmp_path / "trace")), tmp_path / "saving.pt")
    hostile = with_program(saving, tmp_path / "hostile.pt", lambda text: text.replace(CALL, SPELLINGS[case]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.load(str(hostile))(torch.ones(2))  # type: ignore[no-untyped-call]
    assert (tmp_path / "trace").exists()


def test_a_program_outside_the_code_is_refused(tmp_path: Path) -> None:
    model, old = written(nn.Linear(3, 2), tmp_path / "m.pt"), tmp_path / "old.pt"
    with_program(model, old, str)
    with zipfile.ZipFile(old, "a") as archive:
        archive.writestr(f"{archive.namelist()[0].partition('/')[0]}/model.json", "{}")
    with pytest.raises(BadInput, match=r"torch 1\.3 or older"):
        load_model(old)


def test_what_models_are_made_of_is_not_refused(tmp_path: Path) -> None:
    model = Branches()
    loaded = load_model(written(model, tmp_path / "m.pt")).model
    assert isinstance(loaded, nn.Module)
    x = torch.randn(4, 3)
    assert torch.equal(loaded(x)["it's"], model(x)["it's"])
