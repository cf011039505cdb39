"""The kernels of an engine, read from the list that TensorRT's builder prints."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

__all__ = ["EngineLayer", "read_layers"]

HEAD: Final = re.compile(r"Name: (?P<name>.*?), LayerType: (?P<kind>[^,]+), ")
PARTS: Final = re.compile(r"(Inputs|Constants|Outputs): \[(.*?)\](?=, (?:Constants|Outputs|TacticName): )")
TYPE: Final = re.compile(r"Datatype: ([^,]+),")
SOURCE: Final = re.compile(r"\[ONNX Layer: (.*?)\]")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineLayer:
    """One kernel: TensorRT's names, which change from release to release, the types of its tensors, and whose it is.

    Attributes:
        name: TensorRT's name for it.
        kind: its sort (``gemm``, ``correlation``, ``kgen``, ...).
        inputs: types of what it reads, constants not among them.
        constants: types of its constants.
        outputs: types of what it writes.
        sources: nodes of the ONNX file that it computes, as far as it says.
    """

    name: str
    kind: str
    inputs: tuple[str, ...]
    constants: tuple[str, ...]
    outputs: tuple[str, ...]
    sources: tuple[str, ...]


def read_layers(lines: Iterable[str]) -> list[EngineLayer]:
    """Return the kernels of a list; lines of another form are none."""
    return [layer for line in lines if (layer := _read(line)) is not None]


def _read(line: str) -> EngineLayer | None:
    head = HEAD.match(line)
    if head is None:
        return None
    types = {name: tuple(TYPE.findall(text)) for name, text in PARTS.findall(line)}
    return EngineLayer(
        name=head["name"],
        kind=head["kind"],
        inputs=types.get("Inputs", ()),
        constants=types.get("Constants", ()),
        outputs=types.get("Outputs", ()),
        sources=tuple(SOURCE.findall(line)),
    )
