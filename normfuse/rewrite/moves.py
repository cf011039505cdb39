"""Rules that write moves of values as reshapes, permutations, selections and concatenations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Final

import torch
from torch import Tensor
from torch.nn import functional as F

from normfuse.graph import Graph, ops, query
from normfuse.graph.edit import Editor
from normfuse.rewrite.pattern import Match, call
from normfuse.rewrite.rule import Rule

__all__ = ["MOVE_RULES"]

ATEN = ops.ATEN


class StackIsConcatenation(Rule[int]):
    """stack(x, y) = cat(x, y) with an axis of one each."""

    name: ClassVar[str] = "stack-is-concatenation"
    pattern = call(ATEN.stack.default)

    def plan(self, graph: Graph, match: Match) -> int | None:
        """Return the new axis."""
        axis = int(query.argument(match.root, 1, "dim", 0)) % query.rank(match.root)
        return axis if query.is_float(match.root) else None

    def rewrite(self, match: Match, plan: int, edit: Editor) -> None:
        """Concatenate."""
        parts = [edit.call(ops.UNSQUEEZE, each, plan, at=match.root) for each in match.root.args[0]]  # type: ignore[union-attr]
        edit.replace(match.root, ops.CAT, parts, plan)


@dataclass(frozen=True, slots=True)
class _Turn:
    """A shape, an order of its axes, and the shape that it ends in."""

    apart: list[int]
    order: list[int]
    joint: list[int]


class ShuffleIsPermutation(Rule[_Turn]):
    """pixel_shuffle(x; r): channels [C, r, r] go to rows and columns; pixel_unshuffle takes them back."""

    name: ClassVar[str] = "shuffle-is-permutation"
    pattern = call(ATEN.pixel_shuffle.default, ATEN.pixel_unshuffle.default)

    def plan(self, graph: Graph, match: Match) -> _Turn | None:
        """Return the turn; all sizes but the batch are known."""
        node, times = match.root, int(match.root.args[1])  # type: ignore[arg-type]
        sizes, made = query.shape(query.operand(node, 0)), query.shape(node)
        if len(sizes) != 4 or not all(isinstance(size, int) for size in (*sizes[1:], *made[1:])):
            return None
        joint = [-1, *map(int, made[1:])]
        if node.target is ATEN.pixel_shuffle.default:
            _, channels, height, width = joint
            return _Turn([-1, channels, times, times, int(sizes[2]), int(sizes[3])], [0, 1, 4, 2, 5, 3], joint)
        _, _, height, width = joint
        return _Turn([-1, int(sizes[1]), height, times, width, times], [0, 1, 3, 5, 2, 4], joint)

    def rewrite(self, match: Match, plan: _Turn, edit: Editor) -> None:
        """Part the axes, turn them, and join them."""
        apart = edit.call(ops.RESHAPE, match.root.args[0], plan.apart, at=match.root)
        edit.replace(match.root, ops.RESHAPE, edit.call(ops.PERMUTE, apart, plan.order, at=match.root), plan.joint)


class PaddingIsSelection(Rule[dict[int, Tensor]]):
    """pad(x; reflect, replicate or circular) = x at given places."""

    name: ClassVar[str] = "padding-is-selection"
    pattern = call(ops.PAD)

    def plan(self, graph: Graph, match: Match) -> dict[int, Tensor] | None:
        """Return the places by axis; sizes are known."""
        node = match.root
        mode, sides, x = query.argument(node, 2, "mode", "constant"), list(node.args[1]), query.operand(node, 0)  # type: ignore[arg-type]
        found, rank = dict[int, Tensor](), query.rank(x)
        if mode == "constant" or not query.is_float(x):
            return None
        for index in range(len(sides) // 2):
            size, (low, high) = query.shape(x)[rank - 1 - index], sides[2 * index : 2 * index + 2]
            if not isinstance(size, int):
                return None
            places = torch.arange(size, dtype=torch.float64)[None, None]
            if low or high:
                found[rank - 1 - index] = F.pad(places, (low, high), mode=mode)[0, 0].long()
        return found

    def rewrite(self, match: Match, plan: dict[int, Tensor], edit: Editor) -> None:
        """Select along one axis after the other."""
        node, found = match.root, query.operand(match.root, 0)
        for axis, places in plan.items():
            index = edit.constant(places, f"{node.name}_places_{axis}", like=node)
            found = edit.call(ops.INDEX_SELECT, found, axis, index, at=node)
        edit.redirect(node, found)


class RepetitionOfEach(Rule[tuple[int, int]]):
    """repeat_interleave(x; n) = x at every place n times."""

    name: ClassVar[str] = "repetition-of-each"
    pattern = call(ATEN.repeat_interleave.self_int)

    def plan(self, graph: Graph, match: Match) -> tuple[int, int] | None:
        """Return the axis and its size, which must be known."""
        axis, x = query.argument(match.root, 2, "dim"), query.operand(match.root, 0)
        if axis is None or not query.is_float(x):
            return None
        size = query.shape(x)[int(axis)]
        return (int(axis) % query.rank(x), size) if isinstance(size, int) else None

    def rewrite(self, match: Match, plan: tuple[int, int], edit: Editor) -> None:
        """Select."""
        node, (axis, size) = match.root, plan
        places = torch.arange(size).repeat_interleave(int(node.args[1]))  # type: ignore[arg-type]
        index = edit.constant(places, f"{node.name}_places", like=node)
        edit.replace(node, ops.INDEX_SELECT, node.args[0], axis, index)


MOVE_RULES: Final[tuple[Rule[Any], ...]] = (
    StackIsConcatenation(),
    ShuffleIsPermutation(),
    PaddingIsSelection(),
    RepetitionOfEach(),
)
