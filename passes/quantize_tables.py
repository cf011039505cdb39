"""Holds embedding and position tables as codes of eight bits."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import ClassVar, Final

import torch
from torch import Tensor, fx

from normfuse.graph import Graph, ops, query
from normfuse.graph.edit import Editor, editing
from normfuse.kernels.ops import DEQUANTIZE, UNPACK
from normfuse.pipeline import Fact, Pass
from normfuse.quant import IntegerType, quantize, weight_params
from normfuse.report import PassReport

__all__ = ["QuantizeTables"]

SMALLEST: Final = 1024
"""Elements below which the scales would eat up what codes save."""

MASKING: Final = 1e4
"""A number that large says that what it is added to shall not count; one scale for it and others would lose these."""

TABLE: Final = IntegerType(8, signed=True, narrow=True)
"""No integer kernel reads a table, so that no target narrows it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizeTables(Pass):
    """Hold large constants that are no weights as int8, one scale per channel or position.

        before   y = embedding(T, ids)                    y = x + P
        after    y = dequantize(embedding(codes, ids))    y = x + unpack(codes)

    1. A table that only lookups read is looked up as codes, and what was looked up becomes floats: a scale per channel.
    2. A constant that is added is unpacked before: a scale per row. onnxruntime does it once, when it loads the file.
    3. What several kinds of operators read stays float, and so do masks, small constants and other types than float32.

    Not exact: every number moves by half a step at most, where a step is a 127th of its row's or channel's largest.
    """

    name: ClassVar[str] = "quantize-tables"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.FOLDED})

    def run(self, graph: Graph) -> PassReport:
        """Edit the graph."""
        tables = [node for node in graph.nodes if query.is_constant(node) and _is_large(graph, node)]
        applied = list[str]()
        with editing(graph) as edit:
            for table in tables:
                readers = query.readers(table)
                if all(_looks_up(reader, table) for reader in readers):
                    _look_up_codes(graph, edit, table, readers)
                    applied.append("lookup")
                elif all(query.is_call(reader, ops.ADD) for reader in readers):
                    edit.redirect(table, _unpacked(graph, edit, table, readers[0]))
                    applied.append("sum")
        return PassReport(name=self.name, applied=PassReport.count(applied))


def _is_large(graph: Graph, node: fx.Node) -> bool:
    tensor = query.constant(graph, node)
    if tensor.dtype is not torch.float32 or tensor.ndim < 2 or tensor.numel() < SMALLEST:
        return False
    return bool(tensor.abs().max() < MASKING)  # false for NaN


def _looks_up(reader: fx.Node, table: fx.Node) -> bool:
    return query.is_call(reader, ops.EMBEDDING) and reader.args[0] is table


def _look_up_codes(graph: Graph, edit: Editor, table: fx.Node, readers: list[fx.Node]) -> None:
    tensor, stem = query.constant(graph, table), str(table.target)
    params = weight_params(tensor, 1, TABLE)
    codes = edit.constant(quantize(tensor, params), f"{stem}_codes", like=table)
    scale = edit.constant(params.scale, f"{stem}_scale", like=table)
    zero = edit.constant(params.stored_zero_point, f"{stem}_zero_point", like=table)
    for reader in readers:
        found = edit.call(ops.EMBEDDING, codes, *reader.args[1:], at=reader, name=f"{reader.name}_codes")
        edit.replace(reader, DEQUANTIZE, found, scale, zero, query.rank(reader) - 1)


def _unpacked(graph: Graph, edit: Editor, table: fx.Node, at: fx.Node) -> fx.Node:
    tensor, stem = query.constant(graph, table), str(table.target)
    rows = _as_rows(tensor)
    params = weight_params(rows, 0, TABLE)
    codes = edit.constant(quantize(rows, params), f"{stem}_codes", like=table)
    scale = edit.constant(params.scale, f"{stem}_scale", like=table)
    values = edit.call(UNPACK, codes, scale, at=at, name=f"{stem}_values".replace(".", "_"))
    return edit.call(ops.RESHAPE, values, list(tensor.shape), at=at)


def _as_rows(tensor: Tensor) -> Tensor:
    """Return [1, tokens, channels] as [tokens, channels]: a scale for every row of the last axis."""
    return tensor.reshape(prod(tensor.shape[:-1]), tensor.shape[-1])
