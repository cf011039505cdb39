"""TorchScript archives: a program for torch's own interpreter, refused where it touches files."""

from __future__ import annotations

from pathlib import Path

import torch

from normfuse.errors import BadInput
from normfuse.loading.content import ARCHIVE_HINT
from normfuse.loading.quiet import quiet_torch
from normfuse.loading.script_vetting import vet_script

__all__ = ["read"]


def read(path: Path, *, trust: bool) -> torch.jit.ScriptModule:
    """Return the scripted module, on the CPU.

    Raises:
        BadInput: the archive is broken, or its program touches files and ``trust`` is false.
    """
    try:
        with quiet_torch():
            if not trust:
                vet_script(path)
            module: torch.jit.ScriptModule = torch.jit.load(str(path), map_location="cpu")
    except (RuntimeError, ValueError, OSError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise BadInput(f"the TorchScript archive is broken: {first}", where=str(path), hint=ARCHIVE_HINT) from error
    return module
