"""Carries a frozen norm's affine along the residual stream: post-norm networks become norm-free."""

from __future__ import annotations

from dataclasses import dataclass
from math import log2
from typing import ClassVar, Final

import torch
from torch import fx

from normfuse.graph import Graph, metadata, query
from normfuse.graph.affine import AFFINE, Affine, read_affine
from normfuse.graph.edit import Editor
from normfuse.pipeline import Fact, Pass
from normfuse.report import PassReport, Reason, Refusal
from normfuse.rewrite import Audit, Match, Rule, apply_rules, call, describe_fold
from normfuse.rewrite.carry import Carrying
from normfuse.rewrite.changes import Blocked, Settled

__all__ = ["RescaleStream"]

RANGES: Final = {torch.float16: 8.0}
"""Largest log2 of the ratio of two scales, by type: float16 has 30 octaves for the values themselves."""

WIDE_RANGE: Final = 64.0
"""The same for the types with an exponent of 8 bits or more."""

DIVIDED: Final = "divided"
"""The note on a tensor of the stream: the scale that it lacks, which the next affine carried there adds to."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RescaleStream(Pass):
    """Take an affine off the stream, into what reads the stream and what is written to it (methods 13.4).

        before   x' = a * (x + f(x)) + c,  then g(x'), x' + g(x'), ...
        after    s' = x + f(x),  then g(a s' + c) and s' + g(a s' + c) / a, ...

    The first linear map of g takes in the affine, its last one the division; the affine behind the next sum takes
    over ``a`` and ``c``, and so on along the stream, until the last linear map that reads it. Class tokens, position
    tables and embeddings that are added or concatenated are divided as well. Exact in real arithmetic.
    1. Whatever meets the stream is made by linear maps, tables, constants or affines, and nobody else reads it.
    2. No scale is zero.
    3. The product of the scales so far, by which the stream and what is written to it are divided, stays within
       ``largest_range`` octaves over the channels and the depth (0: what the type allows); beyond, the affine stays
       and the next one starts anew.
    """

    name: ClassVar[str] = "rescale-stream"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.AFFINES, Fact.FOLDED})
    largest_range: float = 0.0
    audit: Audit | None = None

    def run(self, graph: Graph) -> PassReport:
        """Apply the rule wherever it holds and say of every affine left why it stays."""
        return apply_rules(graph, [CarryAlongStream(self.largest_range)], name=self.name, audit=self.audit)


@dataclass(frozen=True, slots=True)
class _Plan:
    settled: Settled
    stream: dict[fx.Node, Affine]


class CarryAlongStream(Rule[_Plan]):
    """Everything that an affine meets is divided by its scale."""

    name: ClassVar[str] = "carry-along-stream"
    pattern = call(AFFINE)

    def __init__(self, largest_range: float) -> None:
        self._largest_range = largest_range

    def plan(self, graph: Graph, match: Match) -> _Plan | Refusal | None:
        """Return every new constant, or why there is one that cannot be made."""
        carrying = Carrying(graph, match.root, query.readers(match.root), rescales=True)
        stream = _divided(carrying, read_affine(graph, match.root)) if carrying.rescaled else {}
        blocked = carrying.blocked or self._beyond(stream | carrying.changes.affines)
        found = blocked or carrying.changes.settle(graph)
        if isinstance(found, Blocked):
            return Refusal(match.root.name, found.reason, found.where, query.layer_of(match.root))
        return _Plan(found, stream)

    def _beyond(self, scales: dict[fx.Node, Affine]) -> Blocked | None:
        for node, total in scales.items():
            largest = self._largest_range or RANGES.get(query.dtype(node), WIDE_RANGE)
            if octaves(total) > largest:
                return Blocked(node, Reason.RANGE)
        return None

    def rewrite(self, match: Match, plan: _Plan, edit: Editor) -> None:
        """Write the constants and let the affine's readers read its input."""
        edit.redirect(match.root, match.root.args[0])  # type: ignore[arg-type]
        plan.settled.write(edit)
        for node, total in plan.stream.items():
            metadata.note(node, DIVIDED, total)

    def describe(self, graph: Graph, match: Match, plan: _Plan) -> dict[str, str]:
        """Say which affine went into which layers."""
        formula = "x = a s + c: readers W diag(a), writers diag(1/a) W"
        return describe_fold(graph, match.root, plan.settled, formula)


def _divided(carrying: Carrying, start: Affine) -> dict[fx.Node, Affine]:
    """Return what every tensor of the stream will have been divided by, by this affine and those carried before."""
    stream: dict[fx.Node, Affine] = {}
    for node, found in carrying.carried.items():
        if not query.is_tensor(node):
            continue
        before = metadata.noted(node, DIVIDED)
        total = found.scaling().after(before) if isinstance(before, Affine) else found.scaling()
        stream[node] = start.scaling() if total is None else total
    return stream


def octaves(found: Affine) -> float:
    """Return log2 of the ratio of the largest to the smallest scale, that of 1 with which the stream starts included.

    Channels that all shrink alike differ in nothing, and yet writers are multiplied by the inverse, block by block.
    """
    size = torch.cat([found.scale.abs(), found.scale.new_ones(1)])
    smallest = float(size.min())
    return log2(float(size.max()) / smallest) if smallest else float("inf")
