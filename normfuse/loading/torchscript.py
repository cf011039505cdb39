"""TorchScript archives: a program for torch's own interpreter, refused where it touches files."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

import torch

from normfuse.errors import BadInput
from normfuse.loading.content import ARCHIVE_HINT
from normfuse.loading.quiet import quiet_torch

__all__ = ["read"]

# The only operators of torch's interpreter that open a file; a program may call them from __setstate__,
# which runs at load.
TOUCHES_FILES: Final = re.compile(r"\b(?:torch|aten|ops\.\w+)\.(save|from_file|load_tensor)\b")


def read(path: Path, *, trust: bool) -> torch.jit.ScriptModule:
    """Return the scripted module, on the CPU.

    Raises:
        BadInput: the archive is broken, or its program touches files and ``trust`` is false.
    """
    try:
        with quiet_torch():
            if not trust:
                _refuse_file_access(path)
            module: torch.jit.ScriptModule = torch.jit.load(str(path), map_location="cpu")  # type: ignore[no-untyped-call]
    except (RuntimeError, ValueError, OSError) as error:
        raise BadInput(
            f"the TorchScript archive is broken: {str(error).strip().splitlines()[0]}",
            where=str(path),
            hint=ARCHIVE_HINT,
        ) from error
    return module


def _refuse_file_access(path: Path) -> None:
    # torch's own reader, so that the program checked is the program loaded.
    reader = torch._C.PyTorchFileReader(str(path))
    for member in reader.get_all_records():
        if not (member.startswith("code/") and member.endswith(".py")):
            continue
        if found := TOUCHES_FILES.search(reader.get_record(member).decode(errors="replace")):
            raise BadInput(
                f"the TorchScript program calls {found[0]}, which opens files",
                where=f"{path}: {member}",
                expected="a model that only computes",
                hint="if you wrote the file yourself: trust_pickle=True (--trust-pickle)",
            )
