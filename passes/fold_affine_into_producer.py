"""Folds an affine into the linear map in front of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from normfuse.graph import Graph, ops, query
from normfuse.graph.affine import AFFINE, along, read_affine
from normfuse.graph.edit import Editor
from normfuse.pipeline import Fact, Pass
from normfuse.report import PassReport
from normfuse.rewrite import Match, Rule, apply_rules, call
from normfuse.rewrite.linear_map import read_linear_map, rebind

__all__ = ["FoldAffineIntoProducer", "fold_after"]


def fold_after(weight: Tensor, bias: Tensor | None, *, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``W', b'`` with ``W' x + b' == scale * (W x + b) + shift``; axis 0 of W is the output.

    Computed in float64 and rounded once to the type of ``weight``.
    """
    wide = weight.double() * along(scale, 0, weight.ndim)
    total = shift if bias is None else scale * bias.double() + shift
    return wide.to(weight.dtype), total.expand(weight.shape[0]).to(weight.dtype)


@dataclass(frozen=True, slots=True, kw_only=True)
class FoldAffineIntoProducer(Pass):
    """Fold an affine into the linear or convolution whose only reader it is.

        before   y = scale * (W x + b) + shift
        after    y = W' x + b',  W' = diag(scale) W,  b' = scale * b + shift

    Exact in real arithmetic, for any padding and any groups; rounding differs. Applies where
    1. the affine is the only reader of the linear map,
    2. the affine's axis is the map's output axis (or it is uniform),
    3. weight and bias are constants,
    4. the new ones fit into their type (float16 ends at 65504).
    """

    name: ClassVar[str] = "fold-affine-into-producer"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.AFFINES})
    provides: ClassVar[frozenset[Fact]] = frozenset({Fact.FOLDED})

    def run(self, graph: Graph) -> PassReport:
        """Apply the rule wherever it holds; affines that stay are the consumers' pass's matter."""
        return apply_rules(graph, [FoldAfter()], name=self.name)


@dataclass(frozen=True, slots=True)
class _Folded:
    weight: Tensor
    bias: Tensor


class FoldAfter(Rule[_Folded]):
    """affine(linear(x)) is linear."""

    name: ClassVar[str] = "fold-after-linear"
    pattern = call(AFFINE, args=(call(ops.LINEAR, *ops.CONVOLUTIONS, as_="linear"),))

    def plan(self, graph: Graph, match: Match) -> _Folded | None:
        """Return the new weight and bias."""
        found, linear = read_affine(graph, match.root), read_linear_map(graph, match["linear"])
        if linear is None or query.only_reader(match["linear"]) is None:
            return None
        if not found.is_uniform and found.axis != linear.output_axis:
            return None
        weight, bias = fold_after(linear.weight, linear.bias, scale=found.scale, shift=found.shift)
        return _Folded(weight, bias) if bool(weight.isfinite().all() and bias.isfinite().all()) else None

    def rewrite(self, match: Match, plan: _Folded, edit: Editor) -> None:
        """Give the linear map its new constants and let the affine's readers read it."""
        linear = match["linear"]
        edit.redirect(match.root, linear)
        rebind(edit, linear, plan.weight, plan.bias)

    def describe(self, match: Match, plan: _Folded) -> dict[str, str]:
        """Say which affine went into which layer."""
        return {
            "affine": query.layer_of(match.root) or match.root.name,
            "into": query.layer_of(match["linear"]) or match["linear"].name,
            "formula": "W' = diag(a) W, b' = a b + c",
        }
