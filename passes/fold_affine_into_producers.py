"""Folds an affine into the linear maps that make its input."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from normfuse.graph import Graph
from normfuse.graph.affine import AFFINE, read_affine
from normfuse.graph.edit import Editor
from normfuse.pipeline import Fact, Pass
from normfuse.report import PassReport
from normfuse.rewrite import Audit, Match, Rule, apply_rules, call, describe_fold
from normfuse.rewrite.changes import Blocked, Changes, Settled
from normfuse.rewrite.push import push

__all__ = ["FoldAffineIntoProducers"]


@dataclass(frozen=True, slots=True, kw_only=True)
class FoldAffineIntoProducers(Pass):
    """Fold an affine into what makes its input.

        before   y = scale * (W x + b) + shift
        after    y = W' x + b',  W' = diag(scale) W,  b' = scale * b + shift

    Exact in real arithmetic, for any padding, groups and transposition; rounding differs. Goes back through views,
    selections, means, pooling, interpolation, sums (``a (x + y) + c = (a x + c) + a y``) and concatenations, and also
    into embedding tables, constants and other affines; scales without shifts go through products of two tensors, those
    that are positive through ReLU. Applies where
    1. nobody else reads what the affine goes through, or reads only channels that it leaves alone,
    2. the channels arrive whole at each linear map's output axis,
    3. weights and biases are constants,
    4. no maximum (ReLU is one) is taken behind a negative scale, no zeros are padded behind a shift,
    5. the new constants fit into their type (float16 ends at 65504).

    An affine that stays is the consumers' pass's matter, which reports it.
    """

    name: ClassVar[str] = "fold-affine-into-producers"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.AFFINES})
    provides: ClassVar[frozenset[Fact]] = frozenset({Fact.FOLDED})
    audit: Audit | None = None

    def run(self, graph: Graph) -> PassReport:
        """Apply the rule wherever it holds."""
        return apply_rules(graph, [FoldBehind()], name=self.name, audit=self.audit)


class FoldBehind(Rule[Settled]):
    """affine(linear(x)) is linear."""

    name: ClassVar[str] = "fold-behind-linear"
    pattern = call(AFFINE)

    def plan(self, graph: Graph, match: Match) -> Settled | None:
        """Return every new constant."""
        source, changes = match.root.args[0], Changes()
        assert isinstance(source, fx.Node)
        if push(graph, source, read_affine(graph, match.root), match.root, changes) is not None:
            return None
        settled = changes.settle(graph)
        return None if isinstance(settled, Blocked) else settled

    def rewrite(self, match: Match, plan: Settled, edit: Editor) -> None:
        """Write the constants and let the affine's readers read its input."""
        plan.write(edit)
        edit.redirect(match.root, match.root.args[0])  # type: ignore[arg-type]

    def describe(self, graph: Graph, match: Match, plan: Settled) -> dict[str, str]:
        """Say which affine went into which layers."""
        return describe_fold(graph, match.root, plan, "W' = diag(a) W, b' = a b + c")
