"""Holds embedding and position tables as codes of eight bits, or of four in groups."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Final

import torch
from torch import fx

from normfuse.graph import Graph, ops, query
from normfuse.graph.edit import Editor, editing
from normfuse.kernels.ops import DEQUANTIZE, GROUPED_LOOKUP, UNPACK
from normfuse.pipeline import Fact, Pass
from normfuse.quant import INT8_NARROW, IntegerType, WeightClip, dividing_group, quantize, weight_params
from normfuse.quant.bits import MOST_GROUPED
from normfuse.report import PassReport

__all__ = ["QuantizeTables"]

SMALLEST: Final = 1024
"""Elements below which the scales would eat up what codes save."""

MASKING: Final = 1e4
"""A number that large says that what it is added to shall not count; one scale for it and others would lose these."""

LARGEST_GROUP: Final = 32
"""Neighbours that share a scale at four bits. Tables are most of a small text model, and nothing learns them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizeTables(Pass):
    """Hold large constants that are no weights as codes, one scale per channel, position or group.

        before        y = embedding(T, ids)                    y = x + P
        eight bits    y = dequantize(embedding(codes, ids))    y = x + unpack(codes)
        four          y = grouped_lookup(codes, ids)           y = x + unpack(codes)

    1. A table that only lookups read is looked up as codes, and what was looked up becomes floats: a scale per channel.
    2. A constant that is added is unpacked before: a scale per row. onnxruntime does it once, when it loads the file.
    3. What several kinds of operators read stays float, and so do masks, small constants and other types than float32.
    4. At four bits or fewer ``LARGEST_GROUP`` neighbours of a row share a scale, clipped where their squared error is
       least. A table whose rows such groups do not divide has eight.

    Not exact: at eight bits every number moves by half a step at most, where a step is a 127th of its row's or
    channel's largest.
    """

    name: ClassVar[str] = "quantize-tables"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.FOLDED})

    type: IntegerType = INT8_NARROW

    def run(self, graph: Graph) -> PassReport:
        """Edit the graph."""
        tables = [node for node in graph.nodes if query.is_constant(node) and _is_large(graph, node)]
        applied = list[str]()
        with editing(graph) as edit:
            for table in tables:
                readers = query.readers(table)
                if all(_looks_up(reader, table) for reader in readers):
                    if (group := self._group(graph, table)) is None:
                        _look_up_codes(graph, edit, table, readers)
                    else:
                        self._look_up_groups(graph, edit, table, readers, group)
                    applied.append("lookup" if group is None else "grouped lookup")
                elif all(query.is_call(reader, ops.ADD) for reader in readers):
                    group = self._group(graph, table)
                    edit.redirect(table, self._unpacked(graph, edit, table, readers[0], group))
                    applied.append("sum" if group is None else "grouped sum")
        return PassReport(name=self.name, applied=PassReport.count(applied))

    def _group(self, graph: Graph, table: fx.Node) -> int | None:
        """Return how many neighbours of a row share a scale; None: the table has eight bits (4)."""
        return dividing_group(_channels(graph, table), LARGEST_GROUP) if self.type.bits <= MOST_GROUPED else None

    def _look_up_groups(self, graph: Graph, edit: Editor, table: fx.Node, readers: list[fx.Node], group: int) -> None:
        tensor, stem = query.constant(graph, table), str(table.target)
        params = weight_params(tensor, 0, self.type, clip=WeightClip.MSE, group=group)
        codes = edit.constant(quantize(tensor, params), f"{stem}_codes", like=table)
        scale = edit.constant(params.scale, f"{stem}_scale", like=table)
        for reader in readers:
            edit.replace(reader, GROUPED_LOOKUP, codes, scale, reader.args[1], group)

    def _unpacked(self, graph: Graph, edit: Editor, table: fx.Node, at: fx.Node, group: int | None) -> fx.Node:
        """Return the values of codes: a scale for every row of the last axis, or for every group of it."""
        tensor, stem = query.constant(graph, table), str(table.target)
        rows = tensor.reshape(-1, group or tensor.shape[-1])
        if group is None:
            params = weight_params(rows, 0, INT8_NARROW)
        else:
            params = weight_params(rows, 0, self.type, clip=WeightClip.MSE)
        codes = edit.constant(quantize(rows, params), f"{stem}_codes", like=table)
        scale = edit.constant(params.scale, f"{stem}_scale", like=table)
        values = edit.call(UNPACK, codes, scale, at=at, name=f"{stem}_values".replace(".", "_"))
        return edit.call(ops.RESHAPE, values, list(tensor.shape), at=at)


def _is_large(graph: Graph, node: fx.Node) -> bool:
    tensor = query.constant(graph, node)
    if tensor.dtype is not torch.float32 or tensor.ndim < 2 or tensor.numel() < SMALLEST:
        return False
    return bool(tensor.abs().max() < MASKING)  # false for NaN


def _looks_up(reader: fx.Node, table: fx.Node) -> bool:
    return query.is_call(reader, ops.EMBEDDING) and reader.args[0] is table


def _look_up_codes(graph: Graph, edit: Editor, table: fx.Node, readers: list[fx.Node]) -> None:
    tensor, stem = query.constant(graph, table), str(table.target)
    params = weight_params(tensor, 1, INT8_NARROW)
    codes = edit.constant(quantize(tensor, params), f"{stem}_codes", like=table)
    scale = edit.constant(params.scale, f"{stem}_scale", like=table)
    zero = edit.constant(params.stored_zero_point, f"{stem}_zero_point", like=table)
    for reader in readers:
        found = edit.call(ops.EMBEDDING, codes, *reader.args[1:], at=reader, name=f"{reader.name}_codes")
        edit.replace(reader, DEQUANTIZE, found, scale, zero, query.rank(reader) - 1)


def _channels(graph: Graph, table: fx.Node) -> int:
    return query.constant(graph, table).shape[-1]
