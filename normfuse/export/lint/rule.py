"""Holds an ONNX file against what a builder refuses, computes differently or runs slowly, before it is built."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import onnx
import onnx_ir as ir
from onnx_ir.passes.common import LiftConstantsToInitializersPass, ShapeInferencePass

from normfuse.errors import BadInput

__all__ = ["Finding", "Level", "LintRule", "Site", "lint"]


class Level(Enum):
    """How bad a finding is."""

    ERROR = "error"  # the builder refuses the file, or computes something else
    WARNING = "warning"  # the engine is slower or larger than it could be


@dataclass(frozen=True, slots=True)
class Site:
    """Where a rule was broken: a node, or the tensor of a name; and what about it."""

    at: ir.Node | str
    detail: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class LintRule:
    """What must not be in a file.

    Attributes:
        name: kebab-case, as users read it.
        level: how bad it is.
        says: what is wrong, in a sentence.
        mend: what to do about it.
        find: yields the places of a model where it is so.
    """

    name: str
    level: Level
    says: str
    mend: str
    find: Callable[[ir.Model], Iterator[Site]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """A rule that a file breaks, and where: the user's layer if the node has one, else the node's or tensor's name."""

    rule: LintRule
    layer: str
    detail: str

    def as_dict(self) -> dict[str, str]:
        """Return the finding for JSON."""
        return {
            "rule": self.rule.name,
            "level": self.rule.level.value,
            "layer": self.layer,
            "says": self.rule.says,
            "detail": self.detail,
            "mend": self.rule.mend,
        }


def lint(path: Path, rules: Sequence[LintRule]) -> list[Finding]:
    """Return what a file breaks of some rules, errors first, then in the order of rules and nodes.

    Raises:
        BadInput: it is no ONNX file.
    """
    model = _read(path)
    found = [
        Finding(rule=rule, layer=_layer(site.at), detail=site.detail) for rule in rules for site in rule.find(model)
    ]
    return sorted(found, key=lambda each: each.rule.level is Level.WARNING)


def _read(path: Path) -> ir.Model:
    """Return a file with the type of every tensor that can be told, and constants as initializers.

    What its functions compute is told by their bodies; what they are is left to the rules.
    """
    try:
        model = ir.load(path)
    except Exception as error:  # protobuf has errors of its own for what is no model
        raise BadInput(f"{path.name} cannot be read as ONNX", where=str(path), expected="an ONNX model") from error
    LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    with suppress(onnx.shape_inference.InferenceError, ValueError):  # a type that is wrong is what rules look for
        ShapeInferencePass(data_prop=False)(model)
    return model


def _layer(at: ir.Node | str) -> str:
    if isinstance(at, str):
        return at
    return at.metadata_props.get("normfuse.layer") or at.name or at.op_type
