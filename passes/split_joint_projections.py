"""Splits a linear map whose outputs are taken apart again: one joint q, k, v projection becomes three."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from normfuse.graph import Graph, ops, query
from normfuse.graph.edit import Editor
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
    2. The selected axis lies inside the linear's output axis, and nobody reads the joint output whole.

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
    """One part: the rows it takes of the linear map, and the views behind."""

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
        kept = query.rank(match["linear"]) - 1
        order = [int(axis) for axis in match["permute"].args[1]]  # type: ignore[union-attr, arg-type]
        selected = order[int(match.root.args[1]) % len(order)]  # type: ignore[arg-type]
        is_split_off = selected >= kept and _same_leading(match["linear"], match["reshape"], kept)
        if linear is None or not is_split_off or not _all_taken_apart(match["linear"]) or sizes.count(-1) > 1:
            return None
        rows = torch.arange(linear.weight.shape[0]).reshape(sizes[kept:])
        rows = rows.select(selected - kept, int(match.root.args[2])).reshape(-1)  # type: ignore[arg-type]
        return _Part(
            *_rows_of(linear, rows),
            [size for axis, size in enumerate(sizes) if axis != selected],
            [axis - (axis > selected) for axis in order if axis != selected],
        )

    def rewrite(self, match: Match, plan: _Part, edit: Editor) -> None:
        """Write the part's own linear map and views."""
        part = _write(edit, match.root, match["linear"], plan.weight, plan.bias, str(match.root.args[2]))
        shaped = edit.call(ops.RESHAPE, part, plan.sizes, at=match.root)
        edit.replace(match.root, ops.PERMUTE, shaped, plan.order)


class SliceOfLinear(Rule[tuple[int, int]]):
    """chunk(linear, n, -1)[i] and split(linear, size, -1)[i] (1, 2)."""

    name: ClassVar[str] = "slice-of-linear"
    pattern = call(ops.GETITEM, args=(call(*ops.SPLITS, as_="split", args=(call(ops.LINEAR, as_="linear"),)),))

    def plan(self, graph: Graph, match: Match) -> tuple[int, int] | None:
        """Return the first row and the number of rows."""
        split, last = match["split"], query.rank(match["linear"]) - 1
        axis = int(query.argument(split, 2, "dim", 0)) % (last + 1)
        if axis != last or read_linear_map(graph, match["linear"]) is None or not _all_taken_apart(match["linear"]):
            return None
        widths = [int(part.shape[-1]) for part in split.meta["val"]]
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


def _same_leading(linear: fx.Node, reshape: fx.Node, kept: int) -> bool:
    before, after = query.shape(linear), query.shape(reshape)
    return len(after) > kept and all(str(a) == str(b) for a, b in zip(before[:kept], after[:kept], strict=True))


def _all_taken_apart(node: fx.Node) -> bool:
    """Return whether every reader takes a part, so that the joint output is never made."""
    through = (*ops.VIEWS, *ops.SPLITS, ops.ATEN.unbind.int)
    return all(
        query.is_call(reader, ops.SELECT)
        or (query.is_call(reader, ops.GETITEM) and query.is_call(node, *ops.SPLITS, ops.ATEN.unbind.int))
        or (query.is_call(reader, *through) and _all_taken_apart(reader))
        for reader in query.readers(node)
    )
