"""What a torch.export archive may contain, so that loading it cannot run code from it.

torch.export.load evaluates parts of an archive as Python: shape expressions (sympy.sympify), node and argument
names (the generated forward), guards (exec on ``.module()``), pytree contexts (imports of enums and default
factories), operator names (any callable below ``torch`` and ``operator``); it unpickles sample inputs without
restriction where the restricted way fails; and it loads machine code from ``data/aotinductor``. So every string
is checked here by the place where it stands, against a list of what is allowed. The reader is torch's own, so
that both see the same members.
"""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, Final

import torch

from normfuse.errors import BadInput
from normfuse.loading.allowed import (
    is_expression,
    is_guard,
    is_identifier,
    is_operator,
    is_plain,
    is_tree_specification,
)

__all__ = ["vet_archive"]

# Where text is only shown, or passed to an operator as a quoted constant. The same keys elsewhere are not safe:
# torch writes a constant input into a guard without quoting it.
QUOTED: Final = frozenset(
    {
        ("nodes", "metadata"),
        ("graph_module", "metadata"),
        ("nodes", "inputs", "arg", "as_string"),
        ("nodes", "inputs", "arg", "as_strings"),
    }
)
OBJECTS: Final = frozenset({"as_custom_obj", "custom_obj"})
RULES: Final[dict[str, Callable[[str], bool]]] = {
    "name": is_identifier,
    "as_name": is_identifier,
    "forward_arg_names": is_identifier,
    "target": is_operator,
    "as_operator": is_operator,
    "expr_str": is_expression,
    "guards_code": is_guard,
    "in_spec": is_tree_specification,
    "out_spec": is_tree_specification,
}
MACHINE_CODE: Final = "data/aotinductor/"


def vet_archive(file: BinaryIO, path: Path) -> None:
    """Raise BadInput unless loading the archive runs no code from it."""
    reader = torch._C.PyTorchFileReader(file)
    for member in reader.get_all_records():
        try:
            _vet_member(reader, member)
        except _Unsafe as unsafe:
            raise BadInput(
                f"loading the archive could run code from it: {unsafe}",
                where=f"{path}: {member}",
                expected="an archive as torch.export.save writes it, of standard operators",
                hint="if you wrote the file yourself: trust_pickle=True (--trust-pickle)",
            ) from unsafe


class _Unsafe(Exception):
    """A member is not on the list of what is allowed."""


def _vet_member(reader: Any, member: str) -> None:
    if member.startswith(MACHINE_CODE):
        raise _Unsafe("it holds machine code")
    if member.startswith("models/"):
        _vet_program(json.loads(reader.get_record(member)))
    elif member.startswith("data/") and member.endswith("_config.json"):
        _vet_payloads(json.loads(reader.get_record(member)))
    elif member.startswith("data/") and member.endswith(".pt"):
        _vet_pickle(reader.get_record(member))


def _vet_program(program: object) -> None:
    for rule, text in _texts(program, place=()):
        if not rule(text):
            shown = text if len(text) < 80 else text[:77] + "..."
            raise _Unsafe(f"{shown!r} is not allowed there")


def _texts(value: object, *, place: tuple[str, ...]) -> Iterator[tuple[Callable[[str], bool], str]]:
    """Yield every string that torch may evaluate, with the rule for the place where it stands."""
    if any(place[-len(quoted) :] == quoted for quoted in QUOTED):
        return
    if isinstance(value, str):
        yield RULES.get(place[-1] if place else "", is_plain), value
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item, place=place)
    elif isinstance(value, dict):
        for key, item in value.items():
            if key in OBJECTS:
                raise _Unsafe("it holds an object that is no tensor")
            # A dynamic axis may be named by an expression (2*s0).
            yield is_expression if place[-1:] == ("range_constraints",) else is_plain, key
            yield from _texts(item, place=(*place, key))


def _vet_payloads(config: Any) -> None:
    for payload in config["config"].values():
        name = str(payload["path_name"])
        if payload["use_pickle"] is not False or not name.startswith(("weight_", "tensor_")):
            raise _Unsafe(f"{name} is a pickled object")


def _vet_pickle(content: bytes) -> None:
    if not content:
        return
    try:
        # Exactly the call that torch.export.load tries first, so that its unrestricted second try is never reached.
        torch.load(io.BytesIO(content), weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, TypeError, AttributeError, KeyError) as error:
        raise _Unsafe("it holds pickled objects that are not tensors") from error
