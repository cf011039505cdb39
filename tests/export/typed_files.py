"""Files whose floats got another type, and how far rounding to it may lead."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import onnx
import pytest
from float_files import LAYER, types_of
from onnx import TensorProto as T

from normfuse.export.body import TypedBody, write_body
from normfuse.quant.target import BodyType

__all__ = ["BODIES", "KINDS", "TINIEST", "UNIT", "typed"]

KINDS: Final = {BodyType.FP16: T.FLOAT16, BodyType.BF16: T.BFLOAT16}
UNIT: Final = {BodyType.FP16: 2.0**-11, BodyType.BF16: 2.0**-8}
"""What rounding to nearest changes at most, relative to the number."""
TINIEST: Final = 2.0**-25
"""What rounding to float16 changes at most of numbers near zero; bfloat16 has more exponents."""

BODIES = pytest.mark.parametrize("body", list(KINDS), ids=lambda body: body.value)


def typed(
    source: Path, body: BodyType = BodyType.FP16, largest: dict[str, float] | None = None
) -> tuple[TypedBody, Path]:
    """Write the body, and hold what holds for every file: valid, of the same ports, with the layers' names."""
    path = source.with_name("typed") / source.name
    path.parent.mkdir(exist_ok=True)
    found = write_body(source, path, body, largest or {})
    onnx.checker.check_model(str(path), full_check=True)
    types_of(path)
    before, after = onnx.load(source), onnx.load(path)
    assert ports(after) == ports(before)
    layers, kept = layers_of(before), layers_of(after)
    names = [node.name for node in after.graph.node]
    assert all(names), "builders report by name"
    assert len(set(names)) == len(names)
    assert all(kept.get(name, layer) == layer for name, layer in layers.items())
    gone = {node.name for node in before.graph.node if node.op_type not in ("Constant", "DequantizeLinear")} - {*names}
    assert not gone
    return found, path


def ports(model: onnx.ModelProto) -> list[tuple[str, onnx.TypeProto]]:
    return [(each.name, each.type) for each in (*model.graph.input, *model.graph.output)]


def layers_of(model: onnx.ModelProto) -> dict[str, list[str]]:
    return {node.name: [each.value for each in node.metadata_props if each.key == LAYER] for node in model.graph.node}
