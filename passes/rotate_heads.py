"""Inside every head of an attention the channels are turned by a random orthogonal matrix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from normfuse.graph import Graph, metadata, ops, query
from normfuse.graph.edit import Editor
from normfuse.pipeline import Fact, Pass
from normfuse.report import PassReport, Refusal
from normfuse.rewrite import Audit, Match, Rule, apply_rules, call
from normfuse.rewrite.rotation import ROTATED, Rotated, randomly_rotated
from normfuse.rewrite.stream_walk import follow

__all__ = ["RotateHeads"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RotateHeads(Pass):
    """Multiply what every head of an attention reads by a random orthogonal matrix R, one for all heads (methods 12.1).

        before   scores = q k^T,                    y = O (softmax(scores) v) + b
        after    scores = (q R^T) (k R^T)^T,        y = O R^T (softmax(scores) (v R^T)) + b

    "QuaRot" (Ashkboos et al., 2024, arXiv 2404.00456). R goes into the linear maps that make q, k and v and into the
    one that reads the heads. Exact in real arithmetic, and nothing is computed at run time.
    1. The attention is spelled out (`SpellOutAttention`), each head has 8 channels or more.
    2. Linear maps write q, k and v; views that keep the channels of a head together, sums with each other or
       constants, products with one number and RMS norms without gamma may stand between. Not rotary positions.
    3. Only linear maps read what the values become, and nothing but the scores reads q and k.
    """

    name: ClassVar[str] = "rotate-heads"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.AFFINES, Fact.FOLDED})
    seed: int = 0
    audit: Audit | None = None

    def run(self, graph: Graph) -> PassReport:
        """Apply the rule wherever it holds and say of every head left why it stays."""
        return apply_rules(graph, [HeadsTurn(self.seed)], name=self.name, audit=self.audit)


class HeadsTurn(Rule[Rotated]):
    """The channels that one factor of a product has last, with all that they are made of and become."""

    name: ClassVar[str] = "heads-turn"
    pattern = call(ops.MATMUL)

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def plan(self, graph: Graph, match: Match) -> Rotated | Refusal | None:
        """Return the new constants, or what does not turn; None where no linear map writes the channels."""
        both = [self._turned(graph, match.root, factor) for factor in match.root.args[:2]]  # type: ignore[arg-type]
        found = [plan for plan in both if plan is not None]
        return min(found, key=lambda plan: isinstance(plan, Refusal), default=None)

    def _turned(self, graph: Graph, product: fx.Node, factor: fx.Node) -> Rotated | Refusal | None:
        """Return what turns with the last axis of a factor: a query's channels, or a value's."""
        channels = query.shape(factor)[-1]
        if metadata.noted(factor, ROTATED) or not isinstance(channels, int):
            return None
        stream = follow(graph, factor, query.rank(factor) - 1, channels)
        if not stream.writers:
            return None
        return randomly_rotated(graph, stream, product, self._seed)

    def rewrite(self, match: Match, plan: Rotated, edit: Editor) -> None:
        """Write the turned constants."""
        plan.write(edit)

    def describe(self, graph: Graph, match: Match, plan: Rotated) -> dict[str, str]:
        """Say how wide a head is and which layers write and read it."""
        return {
            "affine": f"{plan.stream.block} channels",
            "into": plan.taken_by,
            "formula": "x' = R x in every head: writers R W and R b, readers W R^T",
        }
