"""Rules for views and identities: one spelling, merged, and gone where they change nothing."""

from __future__ import annotations

from typing import Any, ClassVar, Final

from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from normfuse.graph import Graph, ops, query
from normfuse.graph.edit import Editor
from normfuse.rewrite.pattern import Match, call
from normfuse.rewrite.rule import Rule

__all__ = ["VIEW_RULES"]

ATEN = ops.ATEN


class DropIdentity(Rule[fx.Node]):
    """Remove a call that returns its first argument."""

    name: ClassVar[str] = "drop-identity"
    pattern = call()

    def plan(self, graph: Graph, match: Match) -> fx.Node | None:
        """Return the argument to read instead."""
        node = match.root
        source = node.args[0] if node.args else None
        if node.op != "call_function" or not query.is_tensor(source) or not query.is_tensor(node):
            return None
        assert isinstance(source, fx.Node)
        return source if node.target in ops.POINTWISE_KEEPING or _keeps(node, source) else None

    def rewrite(self, match: Match, plan: fx.Node, edit: Editor) -> None:
        """Let the readers read the argument."""
        edit.redirect(match.root, plan)


def _keeps(node: fx.Node, source: fx.Node) -> bool:
    same = _same_shape(query.shape(node), query.shape(source))
    if node.target in (ATEN.slice.Tensor, ATEN.expand.default, ATEN.view.default, ATEN.reshape.default):
        return same
    if node.target is ATEN.permute.default:
        return list(node.args[1]) == list(range(query.rank(source)))  # type: ignore[arg-type]
    if node.target is ops.PAD:
        return not any(node.args[1])  # type: ignore[arg-type]
    if node.target in (ATEN._to_copy.default, ATEN.to.dtype, ATEN.to.dtype_layout, ATEN.type_as.default):
        return query.dtype(node) == query.dtype(source)
    return False


def _same_shape(left: Any, right: Any) -> bool:
    return len(left) == len(right) and all(statically_known_true(a == b) for a, b in zip(left, right, strict=True))


class ViewIsReshape(Rule[list[Any]]):
    """Write every change of shape as reshape."""

    name: ClassVar[str] = "view-is-reshape"
    pattern = call(
        ATEN.view.default,
        ATEN._unsafe_view.default,
        ATEN.flatten.using_ints,
        ATEN.unflatten.int,
        ATEN.unsqueeze.default,
        ATEN.squeeze.dim,
        ATEN.squeeze.dims,
    )

    def plan(self, graph: Graph, match: Match) -> list[Any] | None:
        """Return the new shape; at most one size may be unknown when the graph is built (it becomes -1)."""
        node = match.root
        if node.target in (ATEN.view.default, ATEN._unsafe_view.default):
            return list(node.args[1])  # type: ignore[arg-type]
        sizes = [size if isinstance(size, int) else -1 for size in query.shape(node)]
        return sizes if sizes.count(-1) <= 1 else None

    def rewrite(self, match: Match, plan: list[Any], edit: Editor) -> None:
        """Replace the call."""
        edit.replace(match.root, ops.RESHAPE, match.root.args[0], plan)


class KnownSizes(Rule[list[int]]):
    """Write the sizes that are known as numbers and the one that is not as -1: no size is computed at run time."""

    name: ClassVar[str] = "known-sizes"
    pattern = call(ops.RESHAPE)

    def plan(self, graph: Graph, match: Match) -> list[int] | None:
        """Return the new shape; with two unknown sizes it cannot be written."""
        sizes = [size if isinstance(size, int) else -1 for size in query.shape(match.root)]
        return sizes if sizes.count(-1) <= 1 and sizes != list(match.root.args[1]) else None  # type: ignore[arg-type]

    def rewrite(self, match: Match, plan: list[int], edit: Editor) -> None:
        """Replace the call."""
        edit.replace(match.root, ops.RESHAPE, match.root.args[0], plan)


class TransposeIsPermute(Rule[list[int]]):
    """Write every exchange of axes as permute."""

    name: ClassVar[str] = "transpose-is-permute"
    pattern = call(ATEN.transpose.int, ATEN.t.default, ATEN.movedim.int)

    def plan(self, graph: Graph, match: Match) -> list[int]:
        """Return the order of the axes."""
        order = list(range(query.rank(match.root)))
        if match.root.target is ATEN.movedim.int:
            source, target = (int(axis) % len(order) for axis in match.root.args[1:3])  # type: ignore[arg-type]
            order.insert(target, order.pop(source))
            return order
        first, second = match.root.args[1:3] if match.root.target is ATEN.transpose.int else (0, -1)
        order[first], order[second] = order[second], order[first]  # type: ignore[index]
        return order

    def rewrite(self, match: Match, plan: list[int], edit: Editor) -> None:
        """Replace the call."""
        edit.replace(match.root, ops.PERMUTE, match.root.args[0], plan)


class MergePermutes(Rule[list[int]]):
    """Two permutes in a row are one."""

    name: ClassVar[str] = "merge-permutes"
    pattern = call(ops.PERMUTE, args=(call(ops.PERMUTE, as_="inner"),))

    def plan(self, graph: Graph, match: Match) -> list[int]:
        """Return the order of the one permute."""
        inner = [int(axis) for axis in match["inner"].args[1]]  # type: ignore[union-attr, arg-type]
        rank = len(inner)
        return [inner[int(axis) % rank] % rank for axis in match.root.args[1]]  # type: ignore[union-attr, arg-type]

    def rewrite(self, match: Match, plan: list[int], edit: Editor) -> None:
        """Replace the outer permute; the inner one dies if nobody else reads it."""
        edit.replace(match.root, ops.PERMUTE, match["inner"].args[0], plan)


class MergeReshapes(Rule[Any]):
    """Two reshapes in a row are the outer one."""

    name: ClassVar[str] = "merge-reshapes"
    pattern = call(ops.RESHAPE, args=(call(ops.RESHAPE, as_="inner"),))

    def plan(self, graph: Graph, match: Match) -> Any:
        """Return the outer shape."""
        return match.root.args[1]

    def rewrite(self, match: Match, plan: Any, edit: Editor) -> None:
        """Replace the outer reshape."""
        edit.replace(match.root, ops.RESHAPE, match["inner"].args[0], plan)


VIEW_RULES: Final[tuple[Rule[Any], ...]] = (
    DropIdentity(),
    ViewIsReshape(),
    KnownSizes(),
    TransposeIsPermute(),
    MergePermutes(),
    MergeReshapes(),
)
