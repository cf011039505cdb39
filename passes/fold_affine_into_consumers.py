"""Folds an affine into the linear maps that read it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from normfuse.graph import Graph, ops, query
from normfuse.graph.affine import AFFINE
from normfuse.graph.edit import Editor
from normfuse.pipeline import Fact, Pass
from normfuse.report import PassReport, Reason, Refusal
from normfuse.rewrite import Audit, Match, Rule, apply_rules, call, describe_fold
from normfuse.rewrite.carry import Carrying
from normfuse.rewrite.changes import Blocked, Settled

__all__ = ["FoldAffineIntoConsumers"]


@dataclass(frozen=True, slots=True, kw_only=True)
class FoldAffineIntoConsumers(Pass):
    """Fold an affine into all the linear maps that read it (q, k and v, for example).

        before   y = W (scale * x + shift) + b
        after    y = W' x + b',  W' = W diag(scale),  b' = b + W shift

    Readers are followed through views, selections, rolls, means, pooling, interpolation, sums of tensors with the same
    scale, and concatenations; an affine on the way takes it in. Exact in real arithmetic; rounding differs.
    1. Every reader ends in linear maps with constant weights (or affines): the affine goes.
    2. Some do: those take it in, and the affine stays for the others; not where the norm in front of it applies it at
       no cost, and not behind a view or a split that both kinds share: it would have to be computed twice.
    3. The channels arrive whole at each linear map's input axis.
    4. Where a convolution pads with zeros and the shift is not zero, it is repaired (`padding_repair`), or refused.
    5. No maximum is taken behind a negative scale, no zeros are padded behind a shift.
    6. The new constants fit into their type (float16 ends at 65504).
    """

    name: ClassVar[str] = "fold-affine-into-consumers"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.AFFINES, Fact.FOLDED})
    audit: Audit | None = None

    def run(self, graph: Graph) -> PassReport:
        """Apply the rule wherever it holds and say of every affine left why it stays."""
        return apply_rules(graph, [FoldBefore()], name=self.name, audit=self.audit)


@dataclass(frozen=True, slots=True)
class _Plan:
    readers: tuple[fx.Node, ...]
    settled: Settled


class FoldBefore(Rule[_Plan]):
    """linear(affine(x)) is linear."""

    name: ClassVar[str] = "fold-before-linear"
    pattern = call(AFFINE)

    def plan(self, graph: Graph, match: Match) -> _Plan | Refusal | None:
        """Return the readers that can do without the affine, or why there are none."""
        readers, first = query.readers(match.root), Refusal("", Reason.NO_LINEAR)
        total = len(readers)
        while readers:
            carrying = Carrying(graph, match.root, readers, rescales=False)
            blocked: Blocked | None = carrying.blocked
            settled = None if blocked else carrying.changes.settle(graph)
            if isinstance(settled, Settled):
                if len(readers) < total and _is_free(match.root):
                    return _refusal(match.root, Blocked(match.root, Reason.FREE))
                return _Plan(tuple(readers), settled)
            if isinstance(settled, Blocked):  # the constants of one end do not fit: everything that leads there
                blocked, carrying.entries = settled, frozenset(readers)
            assert blocked is not None
            first = _refusal(match.root, blocked) if len(readers) == total else first
            readers = [reader for reader in readers if reader not in carrying.entries]
        return first

    def rewrite(self, match: Match, plan: _Plan, edit: Editor) -> None:
        """Write the constants and let those readers read the affine's input."""
        for reader in plan.readers:  # first: a repair may put a padding in front of one of them
            edit.substitute(reader, match.root, match.root.args[0])  # type: ignore[arg-type]
        plan.settled.write(edit)

    def describe(self, graph: Graph, match: Match, plan: _Plan) -> dict[str, str]:
        """Say which affine went into which layers."""
        return describe_fold(graph, match.root, plan.settled, "W' = W diag(a), b' = b + W c")


def _refusal(node: fx.Node, blocked: Blocked) -> Refusal:
    return Refusal(node.name, blocked.reason, blocked.where, query.layer_of(node))


def _is_free(node: fx.Node) -> bool:
    """Return whether the affine is gamma and beta of the norm in front of it."""
    source = node.args[0]
    return query.is_call(source, *ops.ONLINE_NORMS) and query.only_reader(source) is not None  # type: ignore[arg-type]
