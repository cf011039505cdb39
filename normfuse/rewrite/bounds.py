"""Rules that write bounds, however spelled, as the clamps that integers know."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Final

from torch import fx

from normfuse.graph import Graph, ops, query
from normfuse.graph.edit import Editor
from normfuse.rewrite.pattern import Match, call
from normfuse.rewrite.rule import Rule

__all__ = ["BOUND_RULES"]

ATEN = ops.ATEN
HARDTANH: Final = ATEN.hardtanh.default
RELU6: Final = ATEN.relu6.default

CLAMPS: Final = (ATEN.clamp.default, ATEN.clamp.Tensor, ATEN.clip.default, ATEN.clip.Tensor)
LOWER: Final = (ATEN.clamp_min.default, ATEN.clamp_min.Tensor, ATEN.maximum.default)
UPPER: Final = (ATEN.clamp_max.default, ATEN.clamp_max.Tensor, ATEN.minimum.default)
BOUNDED: Final = (ops.RELU, RELU6, HARDTANH)


@dataclass(frozen=True, slots=True)
class _Bounds:
    x: fx.Node
    low: float
    high: float


class BoundIsHardtanh(Rule[_Bounds]):
    """clamp(x, a, b), minimum(x, b) and maximum(x, a) of numbers = hardtanh(x; a, b), or relu for 0 and no end."""

    name: ClassVar[str] = "bound-is-hardtanh"
    pattern = call(*CLAMPS, *LOWER, *UPPER)

    def plan(self, graph: Graph, match: Match) -> _Bounds | None:
        """Return the bounds; both must be numbers, in order."""
        node = match.root
        if node.target in CLAMPS:
            x, *given = node.args[0], query.argument(node, 1, "min"), query.argument(node, 2, "max")
        else:
            pair = [node.args[0], query.argument(node, 1, "min" if node.target in LOWER else "max")]
            x, bound = sorted(pair, key=lambda each: _number(graph, each, 0.0) is not None)
            given = [bound, None] if node.target in LOWER else [None, bound]
        low, high = (_number(graph, each, end) for each, end in zip(given, (-math.inf, math.inf), strict=True))
        if low is None or high is None or not low <= high or not query.is_float(x):
            return None
        assert isinstance(x, fx.Node)
        is_alike = query.dtype(x) == query.dtype(node) and query.shape(x) == query.shape(node)
        return _Bounds(x, low, high) if is_alike and not query.is_constant(x) else None

    def rewrite(self, match: Match, plan: _Bounds, edit: Editor) -> None:
        """Call the clamp."""
        _write(edit, match.root, plan)


class BoundOfBound(Rule[_Bounds]):
    """A bound of what is bounded is one: each end of the inner one is bounded by the outer."""

    name: ClassVar[str] = "bound-of-bound"
    pattern = call(*BOUNDED, args=(call(*BOUNDED, as_="inner"),))

    def plan(self, graph: Graph, match: Match) -> _Bounds | None:
        """Return the bounds of both; nobody else reads the inner one."""
        if query.only_reader(match["inner"]) is None:
            return None
        (low, high), ends = _ends(match.root), _ends(match["inner"])
        return _Bounds(query.operand(match["inner"], 0), *(min(max(end, low), high) for end in ends))

    def rewrite(self, match: Match, plan: _Bounds, edit: Editor) -> None:
        """Call one clamp."""
        _write(edit, match.root, plan)


class BoundBeforeView(Rule[tuple[()]]):
    """relu(view(x)) = view(relu(x)) where nobody else reads the view: the bound is part of what makes x."""

    name: ClassVar[str] = "bound-before-view"
    pattern = call(*BOUNDED, args=(call(*ops.VIEWS, ops.UNSQUEEZE, ATEN.squeeze.dim, as_="view"),))

    def plan(self, graph: Graph, match: Match) -> tuple[()] | None:
        """Return a plan if the bound alone reads the view."""
        is_made = query.is_float(match["view"]) and not query.is_constant(match["view"].args[0])
        return () if is_made and query.only_reader(match["view"]) is not None else None

    def rewrite(self, match: Match, plan: tuple[()], edit: Editor) -> None:
        """Bound what the view looks at."""
        node, view = match.root, match["view"]
        moved = edit.call(node.target, view.args[0], *node.args[1:], at=view, like=node, **node.kwargs)  # type: ignore[arg-type]
        edit.set_argument(view, 0, moved)
        edit.redirect(node, view)


def _number(graph: Graph, value: Any, absent: float) -> float | None:
    """Return the number that a bound is, ``absent`` for none, or None for a tensor."""
    if value is None:
        return absent
    if isinstance(value, (int, float)):
        return float(value)
    if not query.is_constant(value) or query.constant(graph, value).numel() != 1:
        return None
    return float(query.constant(graph, value))


def _ends(node: fx.Node) -> tuple[float, float]:
    if node.target is HARDTANH:
        return float(query.argument(node, 1, "min_val", -1)), float(query.argument(node, 2, "max_val", 1))
    return 0.0, 6.0 if node.target is RELU6 else math.inf


def _write(edit: Editor, node: fx.Node, bounds: _Bounds) -> None:
    if (bounds.low, bounds.high) == (0.0, math.inf):
        edit.replace(node, ops.RELU, bounds.x)
    else:
        edit.replace(node, HARDTANH, bounds.x, bounds.low, bounds.high)


BOUND_RULES: Final[tuple[Rule[Any], ...]] = (BoundIsHardtanh(), BoundOfBound(), BoundBeforeView())
