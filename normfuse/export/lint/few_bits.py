"""Rules about codes of 4 bits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import onnx_ir as ir

from normfuse.export.lint.reading import block_size, code_type, constant, is_of_weights, nodes, quantizers
from normfuse.export.lint.rule import Level, LintRule, Site

__all__ = ["FEW_BIT_RULES"]

BLOCKS: Final = (16, 32, 64, 128)
"""Block sizes of weights that become part of a product."""


def _weights(model: ir.Model) -> Iterator[tuple[ir.Node, list[int]]]:
    """Yield what dequantizes 4-bit weights, with their shape."""
    for node in nodes(model, "DequantizeLinear"):
        tensor = constant(node.inputs[0])
        if tensor is not None and tensor.dtype is ir.DataType.INT4:
            yield node, [int(size) for size in tensor.shape]  # type: ignore[arg-type]


def _unfused_blocks(model: ir.Model) -> Iterator[Site]:
    for node, shape in _weights(model):
        block, given = block_size(node), node.attributes.get("axis")
        inputs = shape[1 if given is None else given.as_int()] if len(shape) > 1 else 0
        if block not in BLOCKS:
            yield Site(node, f"blocks of {block}" if block else "no blocks")
        elif block >= inputs:
            yield Site(node, f"one block of {block} for all {inputs} inputs")
        elif inputs % block:
            yield Site(node, f"blocks of {block} in {inputs} inputs")


def _odd_outputs(model: ir.Model) -> Iterator[Site]:
    for node, shape in _weights(model):
        if len(shape) == 2 and shape[-1] % 2:
            yield Site(node, f"{shape}")


def _activations(model: ir.Model) -> Iterator[Site]:
    for node in nodes(model, "QuantizeLinear"):
        if not is_of_weights(node) and code_type(node) is ir.DataType.INT4:
            yield Site(node)


def _floats(model: ir.Model) -> Iterator[Site]:
    for node in quantizers(model):
        if code_type(node) is ir.DataType.FLOAT4E2M1:
            yield Site(node)


FEW_BIT_RULES: Final = (
    LintRule(
        name="int4-activations",
        level=Level.ERROR,
        says="activations have 4-bit codes",
        mend="4 bits are for weights alone",
        find=_activations,
    ),
    LintRule(
        name="float4",
        level=Level.ERROR,
        says="4-bit floats need compute capability 12.0",
        mend="use int4 weights, or build for 12.0 alone",
        find=_floats,
    ),
    LintRule(
        name="int4-blocks",
        level=Level.WARNING,
        says="4-bit weights with these blocks are dequantized by a kernel of their own",
        mend="use blocks of 128, 64, 32 or 16, several of which make up the inputs",
        find=_unfused_blocks,
    ),
    LintRule(
        name="int4-odd-outputs",
        level=Level.WARNING,
        says="4-bit weights with an odd last axis are dequantized by a kernel of their own",
        mend="pad it to an even number",
        find=_odd_outputs,
    ),
)
