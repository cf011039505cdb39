"""What a TorchScript program may name, so that running it opens no file."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Final

import torch

from normfuse.errors import BadInput

__all__ = ["vet_script"]

# The only operators of torch's interpreter that open a file; a program may call them from __setstate__,
# which runs at load.
OPENS_FILES: Final = frozenset({"save", "from_file", "load_tensor"})
# Where this member is, torch takes the program from members that it names, whatever they are called.
OLD_PROGRAM: Final = "model.json"
TRUST_HINT: Final = "if you wrote the file yourself: trust_pickle=True (--trust-pickle)"


def vet_script(path: Path) -> None:
    """Raise BadInput where a program of the archive could reach an operator that opens files.

    TorchScript is written as Python, so Python's own parser reads it: blanks, comments and brackets between the
    parts of a name do not hide it, as they would from a search in the text.
    """
    # torch's own reader, so that the program checked is the program loaded.
    reader = torch._C.PyTorchFileReader(str(path))
    for member in reader.get_all_records():
        if member == OLD_PROGRAM:
            raise _refused("the TorchScript archive was written by torch 1.3 or older", f"{path}: {member}")
        if member.startswith("code/") and member.endswith(".py"):
            _vet_program(reader.get_record(member).decode(), f"{path}: {member}")


def _vet_program(text: str, where: str) -> None:
    try:
        nodes = list(ast.walk(ast.parse(text)))
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise _refused(f"the TorchScript archive is broken: {error}", where) from error
    checked = {id(node.func) for node in nodes if isinstance(node, ast.Call) and _takes_plain_name(node)}
    for node in nodes:
        if found := OPENS_FILES.intersection(_names(node)):
            raise _refused(f"the TorchScript program calls {min(found)}, which opens files", where)
        if isinstance(node, ast.Name) and node.id == "getattr" and id(node) not in checked:
            raise _refused("the TorchScript program calls getattr with a name put together", where)


def _names(node: ast.AST) -> list[str]:
    """Return every name and text that stands in the node itself."""
    return [value for _, value in ast.iter_fields(node) if isinstance(value, str)]


def _takes_plain_name(call: ast.Call) -> bool:
    """Whether the second argument is one literal without escapes, which torch reads just as Python does."""
    if len(call.args) < 2 or not isinstance(name := call.args[1], ast.Constant) or not isinstance(name.value, str):
        return False
    quotes = 2
    is_as_long = (name.end_col_offset or 0) - name.col_offset == len(name.value.encode()) + quotes
    return is_as_long and name.lineno == name.end_lineno and "\\" not in name.value


def _refused(what: str, where: str) -> BadInput:
    return BadInput(what, where=where, expected="a model that only computes", hint=TRUST_HINT)
