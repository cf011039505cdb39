"""Splits a linear map whose outputs are taken apart again: one joint q, k, v projection becomes three."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from normfuse.graph import Graph, ops, query
from normfuse.graph.edit import Editor
from normfuse.graph.metadata import value_of
from normfuse.pipeline import Fact, Pass
from normfuse.report import PassReport
from normfuse.rewrite import Match, Rule, apply_rules, call
from normfuse.rewrite.linear_map import LinearMap, read_linear_map
from normfuse.rewrite.views import VIEW_RULES

__all__ = ["SplitJointProjections"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitJointProjections(Pass):
    """Give every part of a joint projection its own linear map.

        before   p_i = permute(reshape(linear(x, W, b)))[i]     (or the i-th chunk of the linear's last axis)
        after    p_i = permute'(reshape'(linear(x, W_i, b_i)))  with the rows W_i of W that make part i

    1. unbind of an axis is selection of its positions, chunk and split of the last axis are slices of it.
    2. Whoever reads the joint output takes a part of it: selects from an axis that the reshape splits off the
       linear's output axis, or cuts that axis. Else the joint output would be made all the same.

    Exact: the same rows are multiplied. It lets an affine (attention's scale) fold into one part, and no engine
    copies the joint output apart.
    """

    name: ClassVar[str] = "split-joint-projections"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.CANONICAL})

    def run(self, graph: Graph) -> PassReport:
        """Apply the rules to a fixpoint."""
        rules: list[Rule[Any]] = [UnbindIsSelect(), SelectOfHeads(), SliceOfLinear(), *VIEW_RULES]
        return apply_rules(graph, rules, name=self.name)


class UnbindIsSelect(Rule[int]):
    """unbind(x, axis)[i] = select(x, axis, i) (1)."""

    name: ClassVar[str] = "unbind-is-select"
    pattern = call(ops.GETITEM, args=(call(ops.ATEN.unbind.int, as_="unbind"),))

    def plan(self, graph: Graph, match: Match) -> int:
        """Return the axis."""
        return int(query.argument(match["unbind"], 1, "dim", 0))

    def rewrite(self, match: Match, plan: int, edit: Editor) -> None:
        """Replace the item."""
        edit.replace(match.root, ops.SELECT, match["unbind"].args[0], plan, match.root.args[1])


@dataclass(frozen=True, slots=True)
class _Part:
    """One part: its position, the rows it takes of the linear map, and the views behind."""

    index: int
    weight: Tensor
    bias: Tensor | None
    sizes: list[int]
    order: list[int]


class SelectOfHeads(Rule[_Part]):
    """select(permute(reshape(linear))) over an axis that the reshape split off the output axis (2)."""

    name: ClassVar[str] = "select-of-heads"
    pattern = call(
        ops.SELECT, args=(call(ops.PERMUTE, as_="permute", args=(call(ops.RESHAPE, as_="reshape", args=(
            call(ops.LINEAR, as_="linear"),)),)),)
    )  # fmt: skip

    def plan(self, graph: Graph, match: Match) -> _Part | None:
        """Return the part's rows."""
        linear = read_linear_map(graph, match["linear"])
        sizes = [size if isinstance(size, int) else -1 for size in query.shape(match["reshape"])]
        if linear is None or not _is_taken_apart(match["linear"]):
            return None
        kept, selected = query.rank(match["linear"]) - 1, _selected_axis(match.root)
        order, index = _order(match["permute"]), int(match.root.args[2]) % sizes[selected]  # type: ignore[arg-type]
        rows = torch.arange(linear.weight.shape[0]).reshape(sizes[kept:])
        rows = rows.select(selected - kept, index).reshape(-1)
        return _Part(
            index,
            *_rows_of(linear, rows),
            [size for axis, size in enumerate(sizes) if axis != selected],
            [axis - (axis > selected) for axis in order if axis != selected],
        )

    def rewrite(self, match: Match, plan: _Part, edit: Editor) -> None:
        """Write the part's own linear map and views."""
        part = _write(edit, match.root, match["linear"], plan.weight, plan.bias, str(plan.index))
        shaped = edit.call(ops.RESHAPE, part, plan.sizes, at=match.root)
        edit.replace(match.root, ops.PERMUTE, shaped, plan.order)


class SliceOfLinear(Rule[tuple[int, int]]):
    """chunk(linear, n, -1)[i] and split(linear, size, -1)[i] (1, 2)."""

    name: ClassVar[str] = "slice-of-linear"
    pattern = call(ops.GETITEM, args=(call(*ops.SPLITS, as_="split", args=(call(ops.LINEAR, as_="linear"),)),))

    def plan(self, graph: Graph, match: Match) -> tuple[int, int] | None:
        """Return the first row and the number of rows."""
        if read_linear_map(graph, match["linear"]) is None or not _is_taken_apart(match["linear"]):
            return None
        widths = [int(part.shape[-1]) for part in value_of(match["split"])]
        index = int(match.root.args[1])  # type: ignore[arg-type]
        return sum(widths[:index]), widths[index]

    def rewrite(self, match: Match, plan: tuple[int, int], edit: Editor) -> None:
        """Write the part's own linear map."""
        linear = read_linear_map(edit.graph, match["linear"])
        assert linear is not None
        weight, bias = _rows_of(linear, torch.arange(plan[0], sum(plan)))
        part = _write(edit, match.root, match["linear"], weight, bias, str(match.root.args[1]))
        edit.redirect(match.root, part)


def _rows_of(linear: LinearMap, rows: Tensor) -> tuple[Tensor, Tensor | None]:
    return linear.weight[rows], None if linear.bias is None else linear.bias[rows]


def _write(edit: Editor, at: fx.Node, joint: fx.Node, weight: Tensor, bias: Tensor | None, part: str) -> fx.Node:
    stem = str(joint.args[1].target).removesuffix("weight")  # type: ignore[union-attr]
    weight_node = edit.constant(weight, f"{stem}weight_{part}", like=joint)
    bias_node = None if bias is None else edit.constant(bias, f"{stem}bias_{part}", like=joint)
    return edit.call(ops.LINEAR, joint.args[0], weight_node, bias_node, at=at, name=f"{joint.name}_{part}", like=joint)


def _is_taken_apart(linear: fx.Node) -> bool:
    """Return whether every reader takes parts, so that the joint output is never made (2)."""
    return all(_cuts(linear, reader) or _splits_heads(linear, reader) for reader in query.readers(linear))


def _cuts(linear: fx.Node, reader: fx.Node) -> bool:
    """Return whether the reader cuts the output axis and nothing but pieces is read."""
    rank = query.rank(linear)
    is_cut = query.is_call(reader, *ops.SPLITS) and int(query.argument(reader, 2, "dim", 0)) % rank == rank - 1
    return is_cut and all(query.is_call(piece, ops.GETITEM) for piece in query.readers(reader))


def _splits_heads(linear: fx.Node, reader: fx.Node) -> bool:
    """Return whether the reader splits the output axis, and all behind it select from what was split off."""
    kept = query.rank(linear) - 1
    if not query.is_call(reader, ops.RESHAPE) or not _keeps_leading(linear, reader, kept):
        return False
    permutes = query.readers(reader)
    if not all(query.is_call(permute, ops.PERMUTE) for permute in permutes):
        return False
    selects = [select for permute in permutes for select in query.readers(permute)]
    return all(query.is_call(select, ops.SELECT) and _selected_axis(select) >= kept for select in selects)


def _keeps_leading(linear: fx.Node, reshape: fx.Node, kept: int) -> bool:
    """Return whether the reshape leaves the first axes as they are (only one of them may be dynamic)."""
    before, after = query.shape(linear), query.shape(reshape)
    is_written = sum(not isinstance(size, int) for size in after) <= 1
    return (
        is_written
        and len(after) > kept
        and [str(size) for size in before[:kept]] == [str(size) for size in after[:kept]]
    )


def _selected_axis(select: fx.Node) -> int:
    """Return the axis that a select behind a permute takes a position of, as it was in front of the permute."""
    order = _order(select.args[0])  # type: ignore[arg-type]
    return order[int(select.args[1]) % len(order)]  # type: ignore[arg-type]


def _order(permute: fx.Node) -> list[int]:
    return [int(axis) % query.rank(permute) for axis in permute.args[1]]  # type: ignore[union-attr, arg-type]
