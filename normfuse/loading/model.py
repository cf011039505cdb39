"""One door for every model file: recognise it by content, check it, load it, put it in eval mode."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import assert_never

import torch
from torch import nn

from normfuse.loading.content import Content, recognize

__all__ = ["LoadedModel", "ModelKind", "load_model"]


class ModelKind(Enum):
    """What the file held."""

    EXPORTED = "torch.export archive"
    TORCHSCRIPT = "TorchScript archive"
    STATE_DICT = "state dict"
    SAFETENSORS = "safetensors"
    PICKLE = "pickled module"


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """A model and where it came from; modules are in eval mode and on the CPU."""

    kind: ModelKind
    model: nn.Module | torch.export.ExportedProgram | torch.jit.ScriptModule
    path: Path
    sha256: str


def load_model(path: str | Path, *, arch: str | None = None, trust_pickle: bool = False) -> LoadedModel:
    """Return the model in ``path``.

    What is guaranteed without ``trust_pickle``: no pickle is opened except with ``weights_only=True``, and a
    torch.export archive is read completely and checked before torch sees it, because torch evaluates text from
    such archives as Python (shape expressions, node names, guards) and falls back to plain unpickling. A
    TorchScript archive holds a program: it runs in torch's own interpreter, which has no way to Python or to
    other processes; operators that touch files are refused. What is not guaranteed: that torch's C++ readers
    are free of errors, and that a hostile model does not take much time or memory.

    Args:
        path: a torch.export archive, a TorchScript archive, a state dict or a safetensors file.
        arch: ``package.module:factory``, called without arguments, gives the module for a state dict.
        trust_pickle: open the file although doing so runs code from it.

    Raises:
        BadInput: the file is missing, broken, no model, not trusted, or does not fit ``arch``.
        UsageError: ``arch`` is missing for weights, cannot be imported, or is given for a file that needs none.
        UnsupportedModel: the program was exported in training mode.
    """
    path = Path(path)
    content = recognize(path)
    kind, model = _read(path, content, arch, trust_pickle)
    if isinstance(model, nn.Module):
        model.eval()
    return LoadedModel(kind=kind, model=model, path=path, sha256=_sha256(path))


def _read(
    path: Path, content: Content, arch: str | None, trust_pickle: bool
) -> tuple[ModelKind, nn.Module | torch.export.ExportedProgram]:
    from normfuse.loading import exported, torchscript, weights

    if content in {Content.EXPORTED, Content.TORCHSCRIPT}:
        weights.refuse_arch(arch, path)
    match content:
        case Content.EXPORTED:
            return ModelKind.EXPORTED, exported.read(path, trust=trust_pickle)
        case Content.TORCHSCRIPT:
            return ModelKind.TORCHSCRIPT, torchscript.read(path, trust=trust_pickle)
        case Content.SAFETENSORS:
            return ModelKind.SAFETENSORS, weights.build(path, weights.read_safetensors(path), arch)
        case Content.TORCH_ZIP | Content.TORCH_LEGACY:
            found = weights.read_torch(path, trust=trust_pickle)
            if isinstance(found, nn.Module):
                weights.refuse_arch(arch, path)
                return ModelKind.PICKLE, found
            return ModelKind.STATE_DICT, weights.build(path, found, arch)
        case _:
            assert_never(content)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
