"""Rules that write average pooling with windows as the depthwise convolution that it is."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Final

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from normfuse.graph import Graph, metadata, ops, query
from normfuse.graph.edit import Editor
from normfuse.rewrite.pattern import Match, call
from normfuse.rewrite.rule import Rule

__all__ = ["WINDOW_MEAN_RULES", "is_average"]

AVERAGE: Final = "average"

ATEN = ops.ATEN
POOL1D: Final = ATEN.avg_pool1d.default
POOL2D: Final = ATEN.avg_pool2d.default


@dataclass(frozen=True, slots=True)
class _Windows:
    """A depthwise convolution with one weight, of a tensor that is padded at its ends, times a map of factors."""

    channels: int
    kernel: list[int]
    stride: list[int]
    padding: list[int]
    ends: list[int]
    weight: float
    factors: Tensor | None


class WindowMeanIsConvolution(Rule[_Windows]):
    """avg_pool2d(x; k) = conv2d(x, W; groups = C) with W = 1 / (k k) everywhere.

    Windows that are cut off at a border, or do not count what is padded, are means of fewer numbers: where the size
    is known, a map of factors stands behind the convolution.
    """

    name: ClassVar[str] = "window-mean-is-convolution"
    pattern = call(POOL2D)

    def plan(self, graph: Graph, match: Match) -> _Windows | None:
        """Return the convolution; the number of channels must be known."""
        node, sizes = match.root, query.shape(match.root.args[0])  # type: ignore[arg-type]
        if len(sizes) != 4 or not isinstance(sizes[1], int):
            return None
        kernel, padding = _pair(node.args[1]), _pair(query.argument(node, 3, "padding", 0))
        stride = _pair(query.argument(node, 2, "stride") or kernel)
        counts = query.argument(node, 5, "count_include_pad", True) or not any(padding)
        divisor, is_cut = query.argument(node, 6, "divisor_override"), query.argument(node, 4, "ceil_mode", False)
        if counts and not is_cut:
            weight = 1 / (divisor or math.prod(kernel))
            return _Windows(sizes[1], kernel, stride, padding, [0, 0], weight, None)
        if not all(isinstance(size, int) for size in (*sizes[2:], *query.shape(node)[2:])):
            return None
        given = zip(sizes[2:], query.shape(node)[2:], kernel, stride, padding, strict=True)
        ends = [
            max(0, int((after - 1) * step + window - before - 2 * both)) for before, after, window, step, both in given
        ]
        return _cut(node, _Windows(sizes[1], kernel, stride, padding, ends, 1 / math.prod(kernel), None))

    def rewrite(self, match: Match, plan: _Windows, edit: Editor) -> None:
        """Call the convolution."""
        node, x = match.root, query.operand(match.root, 0)
        if any(plan.ends):
            x = edit.call(ops.PAD, x, [0, plan.ends[1], 0, plan.ends[0]], at=node)
        weight = torch.full((plan.channels, 1, *plan.kernel), plan.weight, dtype=query.dtype(x))
        held = edit.constant(weight, f"{node.name}_weight", like=node)
        found = edit.call(ops.CONV2D, x, held, None, plan.stride, plan.padding, [1, 1], plan.channels, at=node)
        metadata.note(found, AVERAGE, True)
        if plan.factors is not None:
            factors = edit.constant(plan.factors.to(query.dtype(x)), f"{node.name}_factors", like=node)
            found = edit.call(ops.MUL, found, factors, at=node)
        edit.redirect(node, found)


def _cut(node: fx.Node, plain: _Windows) -> _Windows:
    """Return windows with the factors that make means of what they count, found on an image of ones."""
    height, width = (int(size) for size in query.shape(query.operand(node, 0))[2:])
    ones = torch.ones(1, 1, height, width, dtype=torch.float64)
    wanted = node.target(ones, *node.args[1:], **node.kwargs)  # type: ignore[operator]
    padded = F.pad(ones, (0, plain.ends[1], 0, plain.ends[0]))
    weight = torch.full((1, 1, *plain.kernel), plain.weight, dtype=torch.float64)
    factors = wanted / F.conv2d(padded, weight, None, plain.stride, plain.padding)
    if bool(torch.allclose(factors, factors.flatten()[0], rtol=1e-12)):
        return replace(plain, weight=plain.weight * float(factors.flatten()[0]))
    return replace(plain, factors=factors)


class EvenPartsAreWindows(Rule[list[int]]):
    """adaptive_avg_pool2d(x; h, w) = avg_pool2d(x; H / h, W / w) where the quotients are whole."""

    name: ClassVar[str] = "even-parts-are-windows"
    pattern = call(ATEN.adaptive_avg_pool1d.default, ATEN.adaptive_avg_pool2d.default)

    def plan(self, graph: Graph, match: Match) -> list[int] | None:
        """Return the window; what is pooled as a whole is a mean and stays."""
        node, axes = match.root, len(match.root.args[1])  # type: ignore[arg-type]
        before, after = query.shape(query.operand(node, 0))[-axes:], query.shape(node)[-axes:]
        if all(size == 1 for size in after) or query.rank(node) != axes + 2:
            return None
        if not all(isinstance(size, int) for size in (*before, *after)):
            return None
        parts = [divmod(int(size), int(part)) for size, part in zip(before, after, strict=True)]
        return None if any(left for _, left in parts) else [window for window, _ in parts]

    def rewrite(self, match: Match, plan: list[int], edit: Editor) -> None:
        """Call the pooling with windows."""
        edit.replace(match.root, POOL2D if len(plan) == 2 else POOL1D, match.root.args[0], plan, plan)


class PoolOfOneAxis(Rule[list[Any]]):
    """avg_pool1d(x) = avg_pool2d of x with a height of one."""

    name: ClassVar[str] = "pool-of-one-axis"
    pattern = call(POOL1D)

    def plan(self, graph: Graph, match: Match) -> list[Any] | None:
        """Return window, step, padding and the rest."""
        node = match.root
        if query.rank(node) != 3:
            return None
        kernel, padding = _pair(node.args[1])[0], _pair(query.argument(node, 3, "padding", 0))[0]
        stride = _pair(query.argument(node, 2, "stride") or kernel)[0]
        rest = [query.argument(node, 4, "ceil_mode", False), query.argument(node, 5, "count_include_pad", True)]
        return [[1, kernel], [1, stride], [0, padding], *rest]

    def rewrite(self, match: Match, plan: list[Any], edit: Editor) -> None:
        """Give the tensor a height and take it back."""
        node = match.root
        flat = edit.call(ops.UNSQUEEZE, node.args[0], 2, at=node)
        edit.replace(node, ATEN.squeeze.dim, edit.call(POOL2D, flat, *plan, at=node), 2)


def _pair(given: Any) -> list[int]:
    """Return two numbers for one or two."""
    numbers = [int(each) for each in given] if isinstance(given, (list, tuple)) else [int(given)]
    return numbers * 2 if len(numbers) == 1 else numbers


WINDOW_MEAN_RULES: Final[tuple[Rule[Any], ...]] = (EvenPartsAreWindows(), PoolOfOneAxis(), WindowMeanIsConvolution())


def is_average(node: fx.Node) -> bool:
    """Return whether a convolution is pooling that was written so: its weight is no parameter of the model."""
    return metadata.noted(node, AVERAGE) is not None
